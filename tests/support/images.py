"""Models of images small enough to be free."""

from typing import Any

from lightning_modules.vision_module import VisionModule
from lightning_modules.vision_transformer import ImageConfig, VisionTransformer
from tests.support.models import tiny_config, tiny_values

IMAGES = ImageConfig(image_size=8, num_channels=1, num_classes=5, patch_size=2, positions="learned", pool="class_token")


def make_images_model(images: ImageConfig = IMAGES, **overrides: Any) -> VisionTransformer:
    """A model that is not initialized; overrides are fields of ModelConfig."""
    return VisionTransformer(tiny_config(causal=False, **overrides), images)


def make_vision_module(
    optim: dict[str, Any] | None = None, module: dict[str, Any] | None = None, **overrides: Any
) -> VisionModule:
    """A VisionModule around a tiny model, built and initialized.

    Args:
        optim: fields of OptimConfig.
        module: further arguments of VisionModule.
        overrides: fields of ModelConfig.
    """
    values = tiny_values(**{"causal": False, **overrides})
    sizes = {"image_size": 8, "num_channels": 1, "num_classes": 5, "patch_size": 2}
    made = VisionModule(values, {"warmup_steps": 0, **(optim or {})}, **{**sizes, **(module or {})})
    made.configure_model()
    return made
