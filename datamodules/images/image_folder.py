"""Images in folders, one for each class: FOLDER/train/CLASS/*.png and FOLDER/val/CLASS/*.png."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import require
from core.paths import require_path
from datamodules.images.image_datamodule import ImageDataModule
from datamodules.images.sources import Labels, Pixels, decode

ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SPLITS = ("train", "val")


class FolderImages:
    """The images of one split.

    Args:
        paths: of the files.
        labels: the class of each.
    """

    def __init__(self, paths: Sequence[Path], labels: Labels) -> None:
        self.paths, self.labels = paths, labels

    def image(self, index: int) -> Pixels:
        path = self.paths[index]
        return decode(path, str(path))


class ImageFolder(ImageDataModule):
    """A folder of images (data=images data.path=FOLDER), read as they are asked for.

    The folders below FOLDER/train are the classes, numbered in the order of their names; FOLDER/val has no others.

    Args:
        path: the folder.
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
        what = "the path of a folder with images in train/CLASS and val/CLASS"
        require_path("data.path", path, what)
        self.path = Path(path)
        require(self.path.is_dir(), "data.path", path, what)
        self.save_hyperparameters()

    @cached_property
    def classes(self) -> list[str]:
        """Return the names of the classes, in order.

        Raises:
            ConfigError: there are fewer than two.
        """
        folder = self.path / "train"
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
        what = f"a folder with at least two folders of images, one for each class, in {folder}"
        require(len(names) >= 2, "data.path", str(self.path), what)
        return names

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def _files(self) -> dict[str, list[tuple[Path, int]]]:
        """Each split's files, with their sizes, in the order of their names below the folder."""
        found = {split: self._list(split) for split in SPLITS}
        for split, files in found.items():
            require(bool(files), "data.path", str(self.path), f"a folder with images in {self.path / split}/CLASS")
        filled = {path.relative_to(self.path / "train").parts[0] for path, _ in found["train"]}
        empty = [name for name in self.classes if name not in filled]
        valid = f"a folder with images of every class: there are none in train/ of {', '.join(empty[:5])}"
        require(not empty, "data.path", str(self.path), valid)
        return found

    def _list(self, split: str) -> list[tuple[Path, int]]:
        folder = self.path / split
        there = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
        unknown = [name for name in there if name not in self.classes]
        valid = f"a folder whose {split}/ has no other classes than train/: {', '.join(unknown[:5])}"
        require(not unknown, "data.path", str(self.path), valid)
        files = (file for name in there for file in (folder / name).rglob("*") if file.suffix.lower() in ENDINGS)
        return sorted((file, file.stat().st_size) for file in files if file.is_file())

    def source(self, split: str) -> FolderImages:
        paths = [path for path, _ in self._files[split]]
        numbers = {name: number for number, name in enumerate(self.classes)}
        labels = [numbers[path.relative_to(self.path / split).parts[0]] for path in paths]
        return FolderImages(paths, np.array(labels, np.int64))

    @property
    def content(self) -> str:
        """Return a digest of the names and sizes of all files: to read them all would take as long as an epoch."""
        digest = hashlib.sha256()
        for split in SPLITS:
            for path, size in self._files[split]:
                digest.update(os.fsencode(path.relative_to(self.path)) + f"\0{size}\n".encode())
        return digest.hexdigest()
