"""The images that need no network: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from core.errors import UserError
from datamodules.images.image_datamodule import ImageDataModule
from datamodules.images.sources import ImageArrays, Labels, Pixels

MEAN, STD = 0.305, 0.376
"""Of the training images' pixels."""
HELD_OUT = 5
"""Of so many images one is for validation, in the order of the file, beginning with the first."""


class Digits(ImageDataModule):
    """Handwritten digits (UCI's test set of optical digits, as scikit-learn brings it), data=digits.

    Every fifth image is held out: 360 for validation, 1,437 to train on. Beside what a model reaches stands a logistic
    regression on the same images' pixels.

    Args:
        batch_size, val_batches, num_workers, seed: see EndlessDataModule.
        image_size: 8 as they are; others are scaled.
        mean, std, augmentation: see ImageDataModule.

    Raises:
        ConfigError: a value out of range.
        UserError: scikit-learn is not installed.
    """

    num_channels, num_classes = 1, 10

    def __init__(
        self,
        batch_size: int,
        val_batches: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        image_size: int = 8,
        mean: Sequence[float] = (MEAN,),
        std: Sequence[float] = (STD,),
        augmentation: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(image_size, 1, batch_size, val_batches, num_workers, seed, mean, std, augmentation)
        self.save_hyperparameters()

    @cached_property
    def _all(self) -> tuple[Pixels, Labels]:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UserError(f"{error.name} is not installed: pip install -r requirements-vision.txt") from error
        found = load_digits()
        pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)[..., None]  # there from 0 to 16
        return pixels, found.target.astype(np.int64)

    def source(self, split: str) -> ImageArrays:
        pixels, labels = self._all
        held_out = np.arange(len(labels)) % HELD_OUT == 0
        chosen = held_out if split == "val" else ~held_out
        return ImageArrays(pixels[chosen], labels[chosen])

    @property
    def content(self) -> str:
        pixels, labels = self._all
        return hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.trainer is not None and self.trainer.is_global_zero:
            print(f"Logistic regression on the pixels: {self.linear_accuracy():.2%} of the validation images")

    def linear_accuracy(self) -> float:
        """Return the share of validation images whose class a logistic regression on the training pixels finds."""
        from sklearn.linear_model import LogisticRegression
        from threadpoolctl import threadpool_limits

        train, val = self.source("train"), self.source("val")
        inputs, held_out = (source.images.reshape(len(source.labels), -1) / 255 for source in (train, val))
        with threadpool_limits(1):  # products this small spend their time waiting for threads
            found = LogisticRegression(max_iter=1000).fit(inputs, train.labels)
        return float((found.predict(held_out) == val.labels).mean())
