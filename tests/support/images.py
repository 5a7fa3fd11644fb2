"""Models of images small enough to be free, and shards of images."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lightning_modules.vision_module import VisionModule
from lightning_modules.vision_transformer import ImageConfig, VisionTransformer
from tests.support.models import tiny_config, tiny_values

Files = dict[str, bytes]
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


def png(level: int, size: int = 6) -> bytes:
    """The file of a square of one gray."""
    file = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), level, np.uint8)).save(file, "png")
    return file.getvalue()


def write_shard(path: Path, files: Files) -> None:
    """A tar archive, as webdataset has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def samples(first: int, number: int) -> Files:
    """Images whose brightness is their number, and whose class is whether that is odd."""
    files: Files = {}
    for n in range(first, first + number):
        files |= {f"{n:04d}.png": png(n), f"{n:04d}.cls": f"{n % 2}\n".encode()}
    return files
