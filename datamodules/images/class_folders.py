"""Images in folders, one for each class: FOLDER/train/CLASS/*.png and FOLDER/val/CLASS/*.png."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from core.errors import require
from datamodules.images.sources import Labels, Pixels, decode

ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SPLITS = ("train", "val")
NAMED = 5


class FolderImages:
    """The images of one split.

    Args:
        paths: of the files.
        labels: the class of each.
    """

    def __init__(self, paths: Sequence[Path], labels: Labels) -> None:
        self.paths, self.labels = paths, labels

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def image(self, index: int) -> Pixels:
        return decode(self.paths[index], self.name(index))


class ClassFolders:
    """The folders below FOLDER/train are the classes, numbered in the order of their names; FOLDER/val has no others.

    Args:
        path: the folder.

    Attributes:
        skipped: how many files there are that are no images by their ending or their place, by what they are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.skipped: Counter[str] = Counter()

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
        valid = f"a folder with images of every class: there are none in train/ of {', '.join(empty[:NAMED])}"
        require(not empty, "data.path", str(self.path), valid)
        return found

    def _list(self, split: str) -> list[tuple[Path, int]]:
        folder = self.path / split
        there = sorted(folder.iterdir()) if folder.is_dir() else []
        unknown = [entry.name for entry in there if entry.is_dir() and entry.name not in self.classes]
        valid = f"a folder whose {split}/ has no other classes than train/: {', '.join(unknown[:NAMED])}"
        require(not unknown, "data.path", str(self.path), valid)
        entries = [entry for name in there if name.is_dir() for entry in name.rglob("*")]
        lost = sorted(str(entry) for entry in [*there, *entries] if entry.is_symlink() and not entry.exists())
        valid = f"a folder without links that lead nowhere: {len(lost)} do, as {lost[0]}" if lost else ""
        require(not lost, "data.path", str(self.path), valid)
        self.skipped["outside of the classes' folders"] += sum(not entry.is_dir() for entry in there)
        images = []
        for entry in entries:
            if entry.is_dir():
                self.skipped["links to folders"] += entry.is_symlink()  # which are not followed: they may lead back
            elif entry.suffix.lower() in ENDINGS and entry.is_file():
                images.append((entry, entry.stat().st_size))
            else:
                self.skipped[entry.suffix.lower() or "without an ending"] += 1
        return sorted(images)

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
