"""Names runs by as much of their folders' paths as tells them apart."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from core.errors import require


def labels(folders: Sequence[Path]) -> list[str]:
    """Return a name for each of several runs' folders: its experiment, or as many of its path's parts as it takes.

    Raises:
        ConfigError: a folder stands twice.
    """
    paths = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, paths, strict=True):
        require(paths.count(path) == 1, "RUN", str(folder), "a folder that is given once")
    experiments = [path.parent.name for path in paths]
    return experiments if len(set(experiments)) == len(paths) else endings(paths, 2)


def endings(paths: Sequence[Path], least: int = 1) -> list[str]:
    """Return the last parts of different absolute paths: the same number of each, `least` or as many as it takes."""
    tried = (["/".join(path.parts[1:][-count:]) for path in paths] for count in itertools.count(least))
    return next(names for names in tried if len(set(names)) == len(paths))
