"""What can happen to a file."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def flip_bit(path: Path, number: int) -> None:
    """Of all bits of the file."""
    content = bytearray(path.read_bytes())
    content[number // 8] ^= 1 << number % 8
    path.write_bytes(content)


def flip(path: Path, place: float = 0.5) -> None:
    """One bit, at this fraction of the file."""
    flip_bit(path, 8 * int(place * path.stat().st_size))


def truncate(path: Path, place: float = 0.5) -> None:
    """To this fraction of it."""
    os.truncate(path, int(place * path.stat().st_size))


@contextmanager
def small_files(num_bytes: int) -> Iterator[None]:
    """While it lasts, this process' files cannot grow beyond so many bytes: what it writes fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
