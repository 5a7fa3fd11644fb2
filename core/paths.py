"""Paths that a user gives: what no file system would take is refused before anything is written."""

import os
import tempfile
from pathlib import Path

from core.errors import require, writing

NAME_BYTES, PATH_BYTES = 255, 4095  # of Linux' and macOS' file systems


def require_path(field: str, value: object, what: str = "the path of a folder") -> None:
    """Refuse an empty path, one with a null character, and one that is too long for any file system.

    An empty one would be the working folder, and comes of a variable of the shell that is not set.

    Raises:
        ConfigError: says which.
    """
    text = str(value)
    require(text.strip() != "", field, value, f"{what}: empty, as from a shell variable that is not set, it is none")
    require("\0" not in text, field, value, f"{what}: there is a null character in it")
    long = len(os.fsencode(text)) > PATH_BYTES or any(len(os.fsencode(p)) > NAME_BYTES for p in text.split("/"))
    require(not long, field, value, f"{what}: a name in it has more than {NAME_BYTES} bytes, or all of it {PATH_BYTES}")


def behind_link(path: Path) -> Path:
    """Return where a link leads, whether anything is there or not; a path that is no link as it is.

    A folder that is made elsewhere and moved to its place cannot take the place of a link.
    """
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def require_new_folder(field: str, path: Path) -> None:
    """Refuse a folder that is there already, or that could not be made; nothing is left of the attempt.

    Raises:
        ConfigError: says which.
    """
    require_path(field, path)
    with writing(field, path):
        require(not os.path.lexists(path), field, str(path), "a new folder: this one is there already")
        nearest = next(folder for folder in path.absolute().parents if folder.exists())
        with tempfile.TemporaryDirectory(dir=nearest):
            pass
