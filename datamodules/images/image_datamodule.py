"""The DataModule of a collection of images: shuffled and augmented training stream, fixed validation sample."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from core.errors import require
from core.limits import require_at_most
from datamodules.endless_datamodule import EndlessDataModule
from datamodules.images.augmentation import Augmentation
from datamodules.images.samples import ImageSamples
from datamodules.images.sources import ImageSource
from datamodules.index import CorpusError

VALIDATION_SEED = 0  # the order of the validation images does not change with the run's seed
MAX_IMAGE_SIZE = 2**14


class ImageDataModule(EndlessDataModule):
    """Subclasses say what the images are: `source`, `num_classes` and `content`.

    Args:
        image_size: height and width of what the model gets; images of other sizes are scaled by their shorter side, and
            their middle is taken.
        num_channels: 1 or 3; gray images get equal channels, colours become their luma.
        batch_size, val_batches, num_workers, seed: see EndlessDataModule.
        mean, std: of pixels from 0 to 1, one number for each channel, to normalize with.
        augmentation: transforms of torchvision, {RandomCrop: {size: 32, padding: 4}}, of training images; null: none.

    Raises:
        ConfigError: a value out of range, or no such transform.
        UserError: torchvision is not installed, and asked for.
    """

    def __init__(
        self,
        image_size: int,
        num_channels: int,
        batch_size: int,
        val_batches: int,
        num_workers: int,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(batch_size, val_batches, num_workers, seed)
        require(image_size >= 1, "data.image_size", image_size, "an integer >= 1")
        require_at_most(MAX_IMAGE_SIZE, "data.image_size", image_size)
        require(num_channels in (1, 3), "data.num_channels", num_channels, "1 or 3")
        for name, values, least in (("mean", mean, 0.0), ("std", std, 1e-6)):
            fits = len(values) == num_channels and all(least <= value <= 1 for value in values)
            require(
                fits, f"data.{name}", list(values), f"a number from {least:g} to 1 for each of {num_channels} channels"
            )
        self.image_size, self.num_channels, self.mean, self.std = image_size, num_channels, mean, std
        self.augmentation = dict(augmentation) if augmentation else None
        self._augment = Augmentation(self.augmentation) if self.augmentation else None

    @abstractmethod
    def source(self, split: str) -> ImageSource:
        """Return the images of train or val; called when they have been prepared."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of classes; known before `prepare_data`."""

    @property
    @abstractmethod
    def content(self) -> str:
        """Return what is in the collection, as far as a run that is resumed must find the same: a digest."""

    @cached_property
    def _train(self) -> ImageSource:
        return self.source("train")

    @cached_property
    def _val(self) -> ImageSource:
        return self.source("val")

    def samples(self, split: str) -> ImageSamples:
        source, seed = (self._train, self.seed) if split == "train" else (self._val, VALIDATION_SEED)
        augment = self._augment if split == "train" else None
        return ImageSamples(source, self.image_size, self.num_channels, self.mean, self.std, seed, augment)

    @property
    def encoding(self) -> dict[str, Any]:
        return image_encoding(self)

    @property
    def num_val_samples(self) -> int:
        return len(self._val.labels)

    def check(self) -> None:
        """Hold the images against the configuration.

        Raises:
            ConfigError: a split has fewer than one batch, or classes that it should not have.
            CorpusError: the first image cannot be read, or one has no class.
        """
        for name, source in (("train", self._train), ("val", self._val)):
            number = len(source.labels)
            require(number >= self.batch_size, "data.batch_size", self.batch_size, f"at most {number}: {name} images")
            least, most = int(source.labels.min()), int(source.labels.max())
            if least < 0:  # as test splits have it whose classes are not given away
                raise CorpusError(f"{name} images have {least} for a class: classes are counted from 0")
            valid = f"more than {most}: the classes of the {name} images"
            require(most < self.num_classes, "data.num_classes", self.num_classes, valid)
            self.samples(name).read(np.zeros(1, np.int64))

    def check_trained_on(self, identity: dict[str, Any]) -> None:
        before = identity.get("corpus", self.content)
        field = "data.path" if hasattr(self, "path") else "data._target_"
        valid = (
            "the images that the run was trained on: names, sizes or classes of these are others, and so may be what "
        )
        require(before == self.content, field, getattr(self, "path", type(self).__name__), f"{valid}a class means")

    @property
    def stream_identity(self) -> dict[str, Any]:
        return {
            **super().stream_identity,
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "augmentation": self.augmentation,
            "corpus": self.content,
        }

    def unigram_loss(self) -> float | None:
        """Return the validation loss, in nats per image, of the classes' frequencies, each counted once more."""
        counts = np.bincount(self._train.labels, minlength=self.num_classes) + 1.0
        return -float(np.log(counts / counts.sum())[self._val.labels].mean())


def image_encoding(data: Any) -> dict[str, Any]:
    """Return what pixels and labels of a DataModule's batches stand for; classes are told apart by their number."""
    sizes = {name: getattr(data, name) for name in ("image_size", "num_channels", "num_classes")}
    return {**sizes, **{name: np.atleast_1d(getattr(data, name)).tolist() for name in ("mean", "std")}}
