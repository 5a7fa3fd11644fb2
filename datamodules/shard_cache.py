"""A folder of fetched shards, shared by the processes of a machine and kept below a size."""

import fcntl
import hashlib
import os
import re
import stat
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any
from uuid import uuid4

from core.errors import ConfigError, writing
from core.printable import printable

Fetch = Callable[[FileIO], None]
"""Brings an open file, which may hold the beginning already, to its full and verified content."""
OWN = "fetched-shards"
"""The cache's own folder, below the one that it is given."""
TAG = "CACHEDIR.TAG"  # https://bford.info/cachedir: backups pass such a folder by
SIGNATURE = b"Signature: 8a477f597d28d172789f06886806bc55"
MARKER = (
    SIGNATURE + b"\n# Shards of corpora that lie elsewhere (data.cache_dir). They can be deleted and fetched again.\n"
)
NAMES = re.compile(r"([0-9a-f]{64})(?:\.npy|\.([0-9]{1,18})\.part)")
LEASES = re.compile(r"[0-9a-f]{32}\.lease")


class ShardCache:
    """Fetches a file once, whoever needs it. Picklable: each copy says by itself what it needs.

    It removes files to stay below its limit. These are only its own: they lie in a folder of its own below the given
    one, which it has made and marked, and have a name and a kind that it gives. Whatever else lies there, or beside
    that folder, is neither counted nor touched.

    | file | what |
    |---|---|
    | CACHEDIR.TAG | says whose folder it is |
    | SHA256.npy | a whole shard; the name keeps what is out of date from being read |
    | SHA256.BYTES.part | one being fetched, locked meanwhile; unlocked: interrupted, and to be gone on with |
    | ID.lease | which shards a ShardCache holds, in a process that lives as long as the file is locked |
    | lock | locked by whoever changes or adds up the above |

    The locks are flock's: they end with their process, however it ends.

    A cache of before there was a folder of its own has its shards in the given one. A shard that is asked for and found
    there is taken over, once its content is what its name says; the others stay, which is said once.

    Args:
        given: the folder below which it lies; made when it is needed.
        limit: bytes of shards, unfinished ones counted in full.

    Raises:
        ConfigError: in any call, the folder cannot be written to, or its own one is somebody else's.
    """

    def __init__(self, given: Path, limit: int) -> None:
        self.given, self.folder, self.limit = given, given / OWN, limit
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._held: set[str] = set()
        self._lease: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"given": self.given, "folder": self.folder, "limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def hold(self, shards: Iterable[str]) -> None:
        """Hold these shards, named by their sha256, from now on, and no others."""
        self._held = set(shards)
        if self._process != os.getpid():  # forked: that lease is the parent's
            self._process, self._lease = os.getpid(), None
        with self._locked():
            if self._lease is None:
                self._lease = self._open_lease()
            os.ftruncate(self._lease, 0)
            os.pwrite(self._lease, " ".join(sorted(self._held)).encode(), 0)

    def get(self, shard: str, num_bytes: int, fetch: Fetch, urgent: bool = True) -> Path | None:
        """Return the shard's file, which stays as long as it is held.

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
                if is_regular(whole) or self._take_over(shard, num_bytes):
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
        with writing("data.cache_dir", self.given):
            self._claim()
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                try:
                    yield
                finally:
                    fcntl.flock(lock, fcntl.LOCK_UN)
            finally:
                os.close(lock)

    def _claim(self) -> None:
        """Make and mark the cache's own folder, or see by its mark that it is that."""
        if self._is_marked():
            return
        new = self.given / f".{OWN}.{os.getpid()}"
        new.mkdir(parents=True, exist_ok=True)
        (new / TAG).write_bytes(MARKER)
        try:
            new.rename(self.folder)  # with the mark in it, and in the place of nothing but an empty folder
        except OSError:
            (new / TAG).unlink()
            new.rmdir()
            if not self._is_marked():  # nor has another process made it meanwhile
                valid = f"a folder in which {OWN} is this project's: it has not made this one, and leaves it as it is"
                raise ConfigError("data.cache_dir", str(self.given), valid) from None
            return
        old = [path for path in self.given.iterdir() if NAMES.fullmatch(path.name)]
        if old and (self.given / "lock").exists():
            print(
                f"{printable(self.given)} holds {len(old)} shards of an older cache. Those that are needed are taken "
                f"over into {OWN}/; the others stay, do not count in data.cache_gb, and can be deleted.",
                file=sys.stderr,
            )

    def _is_marked(self) -> bool:
        if self.folder.is_symlink() or not is_regular(self.folder / TAG):
            return False
        with (self.folder / TAG).open("rb") as file:
            return file.read(len(SIGNATURE)) == SIGNATURE

    def _take_over(self, shard: str, num_bytes: int) -> bool:
        """Move a shard of an older cache into the folder, if there is one with just this content."""
        old = self.given / f"{shard}.npy"
        if not is_regular(old) or old.stat().st_size != num_bytes:
            return False
        with old.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard:
                return False
        old.replace(self.folder / old.name)
        return True

    def _open_lease(self) -> int:
        self._leased()  # clears away those of the dead
        descriptor = os.open(self.folder / f"{uuid4().hex}.lease", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        weakref.finalize(self, _end_lease, descriptor, os.getpid())
        return descriptor

    def _leased(self) -> set[str]:
        """Return the shards that some living process holds."""
        shards: set[str] = set()
        for path in self.folder.iterdir():
            if not LEASES.fullmatch(path.name) or not is_regular(path):
                continue
            with path.open() as lease:
                if try_lock(lease.fileno()):
                    path.unlink()
                else:
                    shards.update(lease.read().split())
        return shards

    def _make_room(self, num_bytes: int, part: Path) -> bool:
        """Remove what was used longest ago, but nothing that is in use, until so many bytes fit beside the rest."""
        ours = ((path, NAMES.fullmatch(path.name)) for path in self.folder.iterdir())
        sizes = {path: _size(path, name) for path, name in ours if name and is_regular(path)}
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


def is_regular(path: Path) -> bool:
    """Return whether it is a file, and no link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _size(path: Path, name: re.Match[str]) -> int:
    """Return what a shard has, or will have once it is whole."""
    return path.stat().st_size if name[2] is None else int(name[2])


def _remove(path: Path) -> bool:
    """Return whether nobody was fetching it, and it is gone."""
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
