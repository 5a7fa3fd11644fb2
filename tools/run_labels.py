"""Names runs by as much of their folders' paths as tells them apart."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from core.errors import require


def labels(folders: Sequence[Path], checkpoints: Sequence[Path] = ()) -> list[str]:
    """Return a name for each of several runs' folders: its experiment, or as many of its path's parts as it takes.

    Args:
        folders: of the runs.
        checkpoints: one of each, if they count: a folder may then stand several times, and the checkpoints' paths tell
            it apart.

    Raises:
        ConfigError: a folder stands twice, or with the same checkpoint.
    """
    paths = [_real(folder) for folder in folders]
    given = list(zip(paths, [_real(checkpoint) for checkpoint in checkpoints] or paths, strict=True))
    valid = "one that is given once, or with another checkpoint" if checkpoints else "a folder that is given once"
    for folder, each in zip(folders, given, strict=True):
        require(given.count(each) == 1, "RUN", str(folder), valid)
    different = list(dict.fromkeys(paths))
    experiments = [path.parent.name for path in different]
    names = experiments if len(set(experiments)) == len(different) else endings(different, 2)
    name_of = dict(zip(different, names, strict=True))
    found = [name_of[path] for path in paths]
    for path in different:
        places = [place for place, other in enumerate(paths) if other == path]
        if len(places) > 1:
            for place, end in zip(places, endings([checkpoints[place].absolute() for place in places]), strict=True):
                found[place] += f" {end}"
    return found


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve, also of links that lead in a circle


def endings(paths: Sequence[Path], least: int = 1) -> list[str]:
    """Return the last parts of different absolute paths: the same number of each, `least` or as many as it takes."""
    tried = (["/".join(path.parts[1:][-count:]) for path in paths] for count in itertools.count(least))
    return next(names for names in tried if len(set(names)) == len(paths))
