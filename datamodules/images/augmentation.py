"""Augmentation by the transforms of torchvision, where it is installed."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from core.errors import ConfigError, InvalidValue, UserError, one_line, require
from datamodules.images.sources import Pixels


class Augmentation:
    """Applies transforms of torchvision.transforms.v2 one after the other.

    Args:
        transforms: {name of a transform: its arguments}, as {RandomCrop: {size: 32, padding: 4}}.

    Raises:
        ConfigError: there is no such transform, or it does not take its arguments.
        UserError: torchvision is not installed, or does not go with torch.
    """

    def __init__(self, transforms: Mapping[str, Any]) -> None:
        try:
            from torchvision.transforms import v2
        except (ImportError, RuntimeError, OSError) as error:  # the last two of one that is made for another torch
            raise UserError(
                f"data.augmentation is torchvision's, which cannot be imported here ({one_line(error)}): install the "
                "torchvision that goes with this torch, or set data.augmentation=null"
            ) from error
        self.transforms = {}
        for name, arguments in transforms.items():
            field = f"data.augmentation.{name}"
            kind = getattr(v2, name, None)
            is_one = isinstance(kind, type) and issubclass(kind, torch.nn.Module)
            require(is_one, field, arguments, "the name of a transform of torchvision.transforms.v2")
            require(arguments is None or isinstance(arguments, Mapping), field, arguments, "a group of its arguments")
            assert kind is not None
            try:
                self.transforms[field] = kind(**(arguments or {}))
            except ConfigError:
                raise
            except Exception as error:
                raise InvalidValue(field, arguments, one_line(error)) from error

    def __call__(self, pixels: Pixels) -> Pixels:
        """Return other pixels, of any size; they are drawn from torch's generator.

        Raises:
            InvalidValue: a transform does not take an image of these sizes, or returns something else.
        """
        image = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 0)))
        for field, transform in self.transforms.items():
            try:
                image = transform(image)
            except Exception as error:
                raise InvalidValue(field, str(transform), one_line(error)) from error
            is_one = (
                isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and image.shape[:1] == pixels.shape[2:]
            )
            valid = "a transform that returns an image of 8 bits and as many channels: normalizing comes after it"
            require(is_one and image.ndim == 3, field, str(transform), valid)
        return np.moveaxis(image.numpy(), 0, -1)
