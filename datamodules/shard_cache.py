"""A folder of fetched shards, shared by the processes of a machine and kept below a size."""

import fcntl
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any
from uuid import uuid4

from core.errors import writing

Fetch = Callable[[FileIO], None]
"""Brings an open file, which may hold the beginning already, to its full and verified content."""


class ShardCache:
    """Fetches a file once, whoever needs it. Picklable: each copy says by itself what it needs.

    | file | what |
    |---|---|
    | SHA256.npy | a whole shard; the name keeps what is out of date from being read |
    | SHA256.BYTES.part | one being fetched, locked meanwhile; unlocked: interrupted, and to be gone on with |
    | ID.lease | which shards a ShardCache holds, in a process that lives as long as the file is locked |
    | lock | locked by whoever changes or adds up the above |

    The locks are flock's: they end with their process, however it ends.

    Args:
        folder: made when it is needed.
        limit: bytes of shards, unfinished ones counted in full.

    Raises:
        ConfigError: in any call, the folder cannot be written to.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._held: set[str] = set()
        self._lease: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def hold(self, shards: Iterable[str]) -> None:
        """These shards, named by their sha256, stay from now on, and no others."""
        self._held = set(shards)
        if self._process != os.getpid():  # forked: that lease is the parent's
            self._process, self._lease = os.getpid(), None
        with self._locked():
            if self._lease is None:
                self._lease = self._open_lease()
            os.ftruncate(self._lease, 0)
            os.pwrite(self._lease, " ".join(sorted(self._held)).encode(), 0)

    def get(self, shard: str, num_bytes: int, fetch: Fetch, urgent: bool = True) -> Path | None:
        """The shard's file, which stays as long as it is held.

        Args:
            shard: its sha256.
            num_bytes: its size.
            fetch: is called if it is not there, by one process only; the others wait.
            urgent: False: returns None instead of waiting, and instead of going beyond the limit because all that is
                there is in use.
        """
        if urgent and (shard not in self._held or self._process != os.getpid()):
            self.hold({*self._held, shard})
        whole = self.folder / f"{shard}.npy"
        while True:
            with self._locked():
                if whole.exists():
                    os.utime(whole)
                    return whole
                part = self._part(shard, num_bytes).open("a+b", buffering=0)
                mine = try_lock(part.fileno())
                if mine and not self._make_room(num_bytes, Path(part.name)) and not urgent:
                    Path(part.name).unlink()
                    part.close()
                    return None
            with part:
                try:
                    if mine:
                        with writing("data.cache_dir", self.folder):
                            fetch(part)
                            os.fsync(part.fileno())
                        with self._locked():
                            Path(part.name).replace(whole)
                        return whole
                    if not urgent:
                        return None
                    fcntl.flock(part, fcntl.LOCK_EX)  # until it is fetched, or whoever did so has died
                finally:
                    fcntl.flock(part, fcntl.LOCK_UN)  # a forked process that has the file too would keep it locked

    def _part(self, shard: str, num_bytes: int) -> Path:
        return self.folder / f"{shard}.{num_bytes}.part"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with writing("data.cache_dir", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                try:
                    yield
                finally:
                    fcntl.flock(lock, fcntl.LOCK_UN)

    def _open_lease(self) -> int:
        self._leased()  # clears away those of the dead
        descriptor = os.open(self.folder / f"{uuid4().hex}.lease", os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        weakref.finalize(self, _end_lease, descriptor, os.getpid())
        return descriptor

    def _leased(self) -> set[str]:
        """The shards that some living process holds."""
        shards: set[str] = set()
        for path in self.folder.glob("*.lease"):
            with path.open() as lease:
                if try_lock(lease.fileno()):
                    path.unlink()
                else:
                    shards.update(lease.read().split())
        return shards

    def _make_room(self, num_bytes: int, part: Path) -> bool:
        """Remove what was used longest ago, but nothing that is in use, until so many bytes fit beside the rest."""
        sizes = {path: _size(path) for path in self.folder.iterdir() if path.suffix in (".npy", ".part")}
        sizes.pop(part, None)
        excess = sum(sizes.values()) + num_bytes - self.limit
        if excess <= 0:
            return True
        leased = self._leased()
        for path in sorted(sizes, key=lambda path: path.stat().st_mtime_ns):
            if path.name.partition(".")[0] not in leased and _remove(path):
                excess -= sizes[path]
                if excess <= 0:
                    return True
        return False


def _size(path: Path) -> int:
    """Of a shard: what it has, or will have once it is whole."""
    return path.stat().st_size if path.suffix == ".npy" else int(path.name.split(".")[1])


def _remove(path: Path) -> bool:
    """Whether nobody was fetching it, and it is gone."""
    with path.open("rb") as file:
        if not try_lock(file.fileno()):
            return False
        path.unlink()
    return True


def _end_lease(descriptor: int, process: int) -> None:
    if os.getpid() == process:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Lock the file unless another one, or another process, has it locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
