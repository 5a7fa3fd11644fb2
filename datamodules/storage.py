"""Gets the files of a prepared corpus: from a folder of this machine, or (remote.py) from anywhere else."""

import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from numpy.lib.format import open_memmap

from core.errors import one_line
from core.untrusted import Untrusted, is_within, open_regular, read_bytes
from datamodules.index import HEADER_BYTES, INDEX_BYTES, ArrayFile, CorpusError, Index, parse_index

Tokens = npt.NDArray[Any]
MAGIC_BYTES = 8
"""Of a .npy file: its name and its version; behind them stands the length of the header."""


class Storage(Protocol):
    """Hands out files by name. Picklable: data-loader workers get a copy.

    Attributes:
        address: of the corpus, for the messages.
        remedy: what to do about a damaged file, for the messages.
    """

    address: str
    remedy: str

    def read(self, name: str, limit: int) -> bytes:
        """Return the content of a small file.

        Args:
            name: of the file.
            limit: bytes that it may have, before READ_LIMITS (core/untrusted.py).

        Raises:
            CorpusError: it cannot be had, or is larger; says why.
        """
        ...

    def check(self, files: Iterable[tuple[ArrayFile, str]]) -> None:
        """Refuse files that can be seen, at no cost, to be missing or not what the index says.

        Args:
            files: each with its expected dtype.

        Raises:
            CorpusError: names the first one.
        """
        ...

    def path(self, file: ArrayFile, num_bytes: int) -> Path:
        """Return the file on this machine, whole; it stays there until `keep` no longer names it.

        Raises:
            CorpusError: it cannot be had; says why.
        """
        ...

    def keep(self, files: list[tuple[ArrayFile, int]]) -> None:
        """Keep these files, which are needed now or next, in this order, and no others."""
        ...


class LocalFolder:
    """A folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, str(folder)
        self.remedy = f"delete {folder} and prepare the corpus again"

    def read(self, name: str, limit: int) -> bytes:
        try:
            return read_bytes(self._inside(name), limit)
        except Untrusted as error:
            raise CorpusError(str(error)) from error

    def check(self, files: Iterable[tuple[ArrayFile, str]]) -> None:
        for file, dtype in files:
            path = self._inside(file.file)
            check_size(path, file.num_bytes(dtype), self.remedy)
            load(path, file, dtype, self.remedy)  # for its header: nothing else of it is read

    def path(self, file: ArrayFile, num_bytes: int) -> Path:
        return self._inside(file.file)

    def _inside(self, name: str) -> Path:
        path = self.folder / name
        if not is_within(self.folder, path):
            raise CorpusError(f"{path} is a link that leads out of its folder")
        return path

    def keep(self, files: list[tuple[ArrayFile, int]]) -> None:
        pass


def check_size(path: Path, num_bytes: int, remedy: str) -> None:
    """Raise CorpusError unless the file is there with that size."""
    found = path.stat() if path.exists() else None
    if found is None or not stat.S_ISREG(found.st_mode) or found.st_size != num_bytes:
        kind = "is no regular file" if found and not stat.S_ISREG(found.st_mode) else None
        words = kind or ("is missing" if found is None else f"has {found.st_size} bytes")
        raise CorpusError(f"{path} {words}, its index says {num_bytes}; {remedy}")


def load(path: Path, file: ArrayFile, dtype: str, remedy: str) -> Tokens:
    """Return the array in a .npy file, memory-mapped and read-only.

    Raises:
        CorpusError: its header says something else than the index.
    """
    try:
        _check_header(path)
        # Not np.load, which opens an archive or a pickle where the first bytes are those of one.
        array = open_memmap(path, mode="r").view(np.ndarray)  # slices of a memmap cost several times as much
    except Exception as error:  # numpy evaluates the header as Python's literals, which fails in many ways
        raise CorpusError(f"{path} cannot be read: {one_line(error)}; {remedy}") from error
    if array.dtype != dtype or array.shape != (file.length,):
        found = f"{array.dtype} of shape {array.shape}"
        raise CorpusError(f"{path} holds {found}, its index says {dtype} of shape ({file.length},); {remedy}")
    return array


def _check_header(path: Path) -> None:
    """Refuse a header longer than the writer's, which numpy would read whole before it looks at its length."""
    with open_regular(path) as file:
        start = file.read(MAGIC_BYTES + 4)
    width = 2 if start[6:7] == b"\x01" else 4  # of the length, in bytes, by the version
    length = MAGIC_BYTES + width + int.from_bytes(start[MAGIC_BYTES : MAGIC_BYTES + width], "little")
    if length > HEADER_BYTES:
        raise ValueError(f"its header has {length:,} bytes, where {HEADER_BYTES} are expected")


def read_index(storage: Storage) -> Index:
    """Return the corpus' description.

    Raises:
        CorpusError: there is none, it cannot be read, or another version of this project wrote it.
    """
    return parse_index(storage.read("index.json", INDEX_BYTES), f"{storage.address}/index.json")
