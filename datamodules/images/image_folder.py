"""Images of one's own: folders of classes, or shards of webdataset."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from core.errors import require
from core.paths import require_path
from core.printable import printable
from core.run_folder import is_main_process
from datamodules.images.class_folders import ClassFolders
from datamodules.images.image_datamodule import ImageDataModule
from datamodules.images.sources import ImageSource
from datamodules.images.tar_shards import TarShards, find_shards

KINDS, KIND = 8, 40
"""Kinds of files that are named, and characters of each."""


class ImageFolder(ImageDataModule):
    """Images in class folders or tar shards (data=images data.path=FOLDER), read as they are asked for.

    Files that are no images are said, with how many there are; links that lead nowhere are refused.

    Args:
        path: a folder as ClassFolders reads it, or one of shards or their pattern as TarShards does.
        image_size, num_channels, batch_size, val_batches, num_workers, seed: see ImageDataModule.
        mean, std, augmentation: see ImageDataModule.

    Raises:
        ConfigError: a value out of range, or no folder with images of at least two classes.
    """

    def __init__(
        self,
        path: str,
        batch_size: int,
        image_size: int,
        num_channels: int = 3,
        val_batches: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        augmentation: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(image_size, num_channels, batch_size, val_batches, num_workers, seed, mean, std, augmentation)
        what = "the path of a folder with images in train/CLASS and val/CLASS, or of shards, as shards/{00..10}.tar"
        require_path("data.path", path, what)
        # What has been unpacked is what is meant, whatever archives lie beside it.
        unpacked = Path(path, "train").is_dir() and any(entry.is_dir() for entry in Path(path, "train").iterdir())
        shards = None if unpacked else find_shards(path)
        require(shards is not None or Path(path).is_dir(), "data.path", path, what)
        self.path = path
        self.collection = ClassFolders(Path(path)) if shards is None else TarShards(shards, path)
        self.save_hyperparameters()

    @property
    def classes(self) -> list[str] | None:
        """Return the names of the classes, in order; None: they have none."""
        return self.collection.classes

    @property
    def num_classes(self) -> int:
        return self.collection.num_classes

    def source(self, split: str) -> ImageSource:
        return self.collection.source(split)

    @cached_property
    def content(self) -> str:
        return self.collection.content

    def check(self) -> None:
        super().check()
        if isinstance(self.collection, TarShards) and is_main_process():
            for line in self.collection.remarks():
                print(printable(line))
        skipped = +self.collection.skipped
        if skipped and is_main_process():
            kinds = ", ".join(f"{number} {printable(kind, KIND)}" for kind, number in skipped.most_common(KINDS))
            more = ", ..." if len(skipped) > KINDS else ""
            print(f"Left out of {printable(self.path)}: {skipped.total()} that are no images ({kinds}{more})")
