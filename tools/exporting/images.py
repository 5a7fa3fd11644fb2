"""A folder with the code of a classifier of images that transformers loads, and what prepares its images."""

import json
from pathlib import Path
from typing import Any

import torch

from core.atomic_write import save_tensors
from lightning_modules.vision_transformer import VisionTransformer
from tools.exporting import remote_code
from tools.exporting.description import dtype_name

FILE = "modeling_placement_image"


def write(
    model: VisionTransformer,
    folder: Path,
    datamodule: Any,
    trained_on: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write config.json, preprocessor_config.json, model.safetensors and the code.

    Args:
        model: of any placement.
        folder: exists.
        datamodule: says how images are scaled and normalized, and what the classes are called.
        trained_on: the identity of the data that it was trained on: names of classes are of these.
        dtype: of the parameters; buffers keep theirs.

    Raises:
        ConfigError: the DataModule's images are others by now.
        UserError: the user's file has an import that cannot be exported; says which, and what to write instead.
    """
    datamodule.check_trained_on(trained_on)
    code = remote_code.sources(model.config, f"{remote_code.__package__}.{FILE}")
    names = getattr(datamodule, "classes", None) or [str(number) for number in range(model.images.num_classes)]
    description = {
        "model_type": "placement_image",
        "architectures": ["PlacementForImageClassification"],
        "auto_map": {
            "AutoConfig": f"{FILE}.PlacementImageConfig",
            "AutoModelForImageClassification": f"{FILE}.PlacementForImageClassification",
        },
        **configuration(model),
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
        "dtype": dtype_name(dtype),
    }
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing(model, datamodule), indent=2) + "\n")
    save_tensors(remote_code.weights(model, dtype), folder / "model.safetensors", {"format": "pt"})
    for name, text in code.items():
        (folder / f"{name}.py").write_text(text, "utf-8")


def configuration(model: VisionTransformer) -> dict[str, Any]:
    """Return the arguments of PlacementImageConfig that describe a model."""
    images = model.images
    return {
        **remote_code.configuration(model),
        "image_size": images.image_size,
        "num_channels": images.num_channels,
        "patch_size": images.patch_size,
        "positions": images.positions,
        "pool": images.pool,
        "num_labels": images.num_classes,
    }


def preprocessing(model: VisionTransformer, datamodule: Any) -> dict[str, Any]:
    """Return how images become what the model reads, as transformers' CLIPImageProcessor has it."""
    size, channels = model.images.image_size, model.images.num_channels
    mean, std = (getattr(datamodule, name) for name in ("mean", "std"))
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean) if isinstance(mean, list | tuple) else [mean] * channels,
        "image_std": list(std) if isinstance(std, list | tuple) else [std] * channels,
    }
