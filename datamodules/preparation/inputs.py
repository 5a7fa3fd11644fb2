"""Finds what an input names: files, folders, globs, datasets, the standard library, installed packages."""

import glob
import itertools
import os
import stat
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from core.errors import InvalidValue, require
from datamodules.package_documents import PACKAGES, package_versions
from datamodules.stdlib_documents import SOURCE

STDLIB = "python_stdlib"
HUB = "hf:"


def find_names(patterns: Iterable[str]) -> tuple[tuple[str, ...], int]:
    """Expand folders (every file below, hidden ones left out) and globs; files come in order of their paths.

    A file that is named more than once, by whatever path or link, is read once.

    Returns:
        The names, and how many further ones there were of files that are among them.

    Raises:
        ConfigError: a pattern that matches nothing, that names something that has no end, or a file of a folder that
            is named as a dataset too.
    """
    names: dict[Any, str] = {}
    num_found = 0
    for pattern in patterns:
        require(bool(pattern), "input", pattern, "names with commas between them; one of these is empty")
        try:
            found = [pattern] if _is_special(pattern) else _files(pattern)
            num_found += len(found)
            for name in found:
                names.setdefault(_identity(name), name)
        except OSError as error:
            raise InvalidValue("input", pattern, f"cannot be read ({error.strerror})") from error
    _check_apart(names.values())
    return tuple(names.values()), num_found - len(names)


def _check_apart(names: Collection[str]) -> None:
    """Refuse files that are in a folder which is named as a dataset too: their texts would count twice."""
    datasets = {place: name for name in names if name.startswith(HUB) and isinstance(place := _place(name), Path)}
    for name in names if datasets else ():
        above = [] if _is_special(name) else [place for place in Path(name).resolve().parents if place in datasets]
        if above:
            raise InvalidValue("input", name, f"it is in {datasets[above[0]]} as well, and would count twice")


def fingerprint(names: Iterable[str]) -> list[list[Any]]:
    """Return [name, bytes, time of the last change in ns] of each; a preparation that goes on must find the same.

    Of the standard library and of packages their versions; of a dataset in a folder its files; of one elsewhere nothing
    can be told.
    """
    return [entry for name in names for entry in _fingerprint(name)]


def legacy_fingerprint(names: Iterable[str]) -> list[list[Any]]:
    """Return [name, size in bytes] of each, as indexes of before times were noted have it."""
    return [[name, Path(name).stat().st_size if Path(name).is_file() else None] for name in names]


def num_bytes(names: Iterable[str]) -> int | None:
    """Return how many there are to read, compressed or not; None where only reading tells."""
    paths = [Path(name) for name in names]
    return sum(path.stat().st_size for path in paths) if all(path.is_file() for path in paths) else None


def _is_special(name: str) -> bool:
    return name in (STDLIB, PACKAGES) or name.startswith(HUB)


def _identity(name: str) -> Any:
    """Return what two names of one file or dataset have in common: a configuration is `default` where none is named."""
    if name.startswith(HUB):
        return HUB, _place(name), name.removeprefix(HUB).partition(":")[2] or "default"
    if name in (STDLIB, PACKAGES):
        return name
    status = os.stat(name)
    return status.st_dev, status.st_ino


def _place(name: str) -> Path | str:
    """Return the folder that `hf:PATH[:SUBSET]` means, or the name of a dataset elsewhere."""
    dataset = name.removeprefix(HUB).partition(":")[0]
    return Path(dataset).resolve() if Path(dataset).is_dir() else dataset.rstrip("/")


def _files(pattern: str) -> list[str]:
    found = [pattern] if Path(pattern).exists() else _glob(pattern)
    below = itertools.chain.from_iterable(
        Path(path).rglob("*") if Path(path).is_dir() else [Path(path)] for path in found
    )
    files = sorted(str(path) for path in below if _is_meant(path, pattern) and not _hidden(path, found))
    valid = f"a file, a folder with files, a glob, {HUB}NAME, {STDLIB} or {PACKAGES}"
    require(bool(files), "input", pattern, valid)
    return files


def _fingerprint(name: str) -> list[list[Any]]:
    if name == STDLIB:
        return [[name, SOURCE, None]]
    if name == PACKAGES:
        return [[name, line, None] for line in package_versions()]
    path = Path(name.removeprefix(HUB))
    if name.startswith(HUB) and path.is_dir():
        files = sorted(below for below in path.rglob("*") if below.is_file())
        return [[name, None, None], *(_state(str(file), file) for file in files)]
    return [_state(name, path)]


def _state(name: str, path: Path) -> list[Any]:
    if not path.is_file():
        return [name, None, None]
    status = path.stat()
    return [name, status.st_size, status.st_mtime_ns]


def _is_meant(path: Path, pattern: str) -> bool:
    """Return whether a path is read: of a folder or a pattern plain files; a pipe only where it is named itself."""
    if path.is_file():
        return True
    if str(path) != pattern or not path.exists() or path.is_dir():
        return False
    if not stat.S_ISFIFO(path.stat().st_mode):
        raise InvalidValue(
            "input", pattern, "a device or socket, which may have no end; a file, a folder or a pipe is read"
        )
    return True


def _glob(pattern: str) -> list[str]:
    """Return what glob.glob does, but `**` follows no symbolic links, which may lead round in circles."""
    if "**" not in Path(pattern).parts:
        return glob.glob(pattern)
    above, _, below = pattern.partition("**")
    roots = [Path(root) for root in glob.glob(above)] if above else [Path()]
    found = [path for root in roots for path in root.glob(f"**{below}") if not _hidden(path, [str(root)])]
    return [str(path) for path in found if not (path.is_symlink() and path.is_dir())]  # which Python 3.13 gives too


def _hidden(path: Path, roots: list[str]) -> bool:
    """Return whether a part of the path below the folder that was asked for begins with a dot."""
    root = next((Path(root) for root in roots if path.is_relative_to(root)), Path())
    return any(part.startswith(".") for part in path.relative_to(root).parts)
