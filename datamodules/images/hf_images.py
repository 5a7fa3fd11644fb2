"""Images of a Hugging Face dataset: from the hub or its cache, or a folder that save_to_disk has written."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import ConfigError, InvalidValue, UserError, one_line, require
from datamodules.images.image_datamodule import ImageDataModule
from datamodules.images.sources import Labels, Pixels, decode
from datamodules.index import CorpusError


class HFImageSplit:
    """The images of one split of a dataset.

    They are decoded here. datasets would open what a row names in the place of its bytes: any file of the user's, or an
    address.

    Args:
        rows: the split, a datasets.Dataset.
        image: name of the column with the images, which is a datasets.Image.
        labels: the class of each.
    """

    def __init__(self, rows: Any, image: str, labels: Labels) -> None:
        import datasets

        self.column, self.labels, self.mode = image, labels, rows.features[image].mode
        self.rows = rows.cast_column(image, datasets.Image(mode=self.mode, decode=False))

    def name(self, index: int) -> str:
        return f"image {index} of the dataset"

    def image(self, index: int) -> Pixels:
        name, row = self.name(index), self.rows[index][self.column]
        content = row["bytes"] if row is not None else None
        if content is None:
            there = f"names {str(row['path'])[:100]!r}" if row is not None and row["path"] is not None else "is empty"
            remedy = "a dataset that save_to_disk or push_to_hub has written has its images in it"
            raise CorpusError(f"{name} {there}, where the bytes of an image are expected: {remedy}")
        return decode(io.BytesIO(content), name, self.mode)


class HFImages(ImageDataModule):
    """A dataset of images with class labels (data=hf_images data.path=NAME).

    Args:
        path: a name on the hub, as uoft-cs/cifar10, or a folder that datasets.DatasetDict.save_to_disk has written.
        num_classes: of the labels.
        train_split, val_split: names of the splits.
        image_column, label_column: names of the columns.
        image_size, num_channels, batch_size, val_batches, num_workers, seed: see ImageDataModule.
        mean, std, augmentation: see ImageDataModule.

    Raises:
        ConfigError: a value out of range.
    """

    num_classes = 0  # said by the instance: it must be known before the data are there

    def __init__(
        self,
        path: str,
        num_classes: int,
        batch_size: int,
        image_size: int,
        num_channels: int = 3,
        train_split: str = "train",
        val_split: str = "test",
        image_column: str = "img",
        label_column: str = "label",
        val_batches: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        augmentation: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(image_size, num_channels, batch_size, val_batches, num_workers, seed, mean, std, augmentation)
        require(num_classes >= 2, "data.num_classes", num_classes, "an integer >= 2")
        self.path, self.num_classes = path, num_classes
        self.splits = {"train": train_split, "val": val_split}
        self.image_column, self.label_column = image_column, label_column
        self.save_hyperparameters()

    @property
    def fetched_from_hub(self) -> dict[str, str]:
        """Return what it asks the hub for, by field; of what is in its cache, whether that is still the newest."""
        return {} if Path(self.path).is_dir() else {"data.path": self.path}

    def prepare_data(self) -> None:
        """Fetch the dataset into the cache of Hugging Face, unless it is there.

        Raises:
            UserError: datasets is not installed.
            ConfigError: there is no such dataset, split or column.
        """
        for split in self.splits:
            self.rows(split)

    def rows(self, split: str) -> Any:
        """Return a split of the dataset, with the two columns that are read."""
        try:
            import datasets
        except ImportError as error:
            raise UserError(f"{error.name} is not installed: pip install -r requirements-vision.txt") from error
        name = self.splits[split]
        try:
            if Path(self.path).is_dir():
                found = datasets.load_from_disk(self.path)[name]
            else:
                found = datasets.load_dataset(self.path, split=name)
        except Exception as error:  # of the library's many kinds, and of the network's
            raise InvalidValue("data.path", self.path, f"split {name}: {one_line(error)}") from error
        for field, column in (("image_column", self.image_column), ("label_column", self.label_column)):
            if column not in found.column_names:
                raise ConfigError(f"data.{field}", column, f"one of {', '.join(found.column_names)}")
        return found.select_columns([self.image_column, self.label_column])

    @cached_property
    def _rows(self) -> dict[str, Any]:
        return {split: self.rows(split) for split in self.splits}

    def source(self, split: str) -> HFImageSplit:
        import datasets

        rows = self._rows[split]
        feature = rows.features[self.image_column]
        valid = f"a column of images, datasets.Image: {self.splits[split]} has {feature}"
        require(isinstance(feature, datasets.Image), "data.image_column", self.image_column, valid)
        feature = rows.features[self.label_column]
        valid = f"a column with the number of each image's class: {self.splits[split]} has {feature}"
        # Before they are read: another kind would be decoded, from wherever its rows say.
        plain = isinstance(feature, datasets.ClassLabel | datasets.Value)
        require(plain, "data.label_column", self.label_column, valid)
        labels = rows.with_format("numpy")[self.label_column][:]
        is_one = isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind in "iu"
        require(is_one, "data.label_column", self.label_column, valid)
        return HFImageSplit(rows, self.image_column, labels.astype(np.int64))

    @cached_property
    def classes(self) -> list[str] | None:
        """Return the names of the classes, in order, where the dataset has them."""
        names = getattr(self._rows["train"].features[self.label_column], "names", None)
        return list(names) if names else None

    def check(self) -> None:
        super().check()
        if self.classes is not None:
            valid = f"{len(self.classes)}: the dataset names so many classes"
            require(self.num_classes == len(self.classes), "data.num_classes", self.num_classes, valid)

    @cached_property
    def content(self) -> str:
        """Return a digest of the labels and of how many images there are: to read all would take an epoch."""
        digest = hashlib.sha256()
        for split in self.splits:
            digest.update(self.source(split).labels.tobytes())
        return digest.hexdigest()
