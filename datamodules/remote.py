"""A corpus that lies elsewhere (s3://, gs://, hf://, https://): whole shards, fetched ahead into a ShardCache."""

import hashlib
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from io import FileIO
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from fsspec.config import conf
from fsspec.core import url_to_fs

from core.errors import Refused, UserError, one_line
from datamodules.index import ArrayFile, CorpusError
from datamodules.shard_cache import ShardCache
from datamodules.storage import LocalFolder, Storage

T = TypeVar("T")
log = logging.getLogger(__name__)
TIMEOUT = 10.0  # seconds after which a request to which nothing (more) comes has failed
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds after a failure, before the next attempt
RETRY = 1.0  # seconds after which a fetch ahead for which there was no room is tried again
CHUNK = 1 << 24  # bytes asked for at a time; what an interrupted fetch loses at most
FETCHES = 2  # of a file whose checksum is wrong
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}
TRY_AGAIN = (408, 425, 429)  # of the HTTP statuses that blame the client


class RemoteFolder:
    """A Storage behind fsspec, whose own configuration and environment variables hold the credentials.

    What `keep` names is fetched by a thread, in that order. Each copy of this object keeps its own files.

    Args:
        address: of the folder with the index.json.
        cache: where its shards are kept, in part.

    Raises:
        ConfigError: no such kind of address, or its package is not installed.
    """

    def __init__(self, address: str, cache: ShardCache) -> None:
        self.address, self.cache = address.rstrip("/"), cache
        self.remedy = f"delete {cache.folder}; if that is of no use, prepare the corpus again"
        self._sizes: dict[str, int | None] = {}
        self._begin()
        self._file_system()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._wanted: deque[tuple[ArrayFile, int]] = deque()
        self._refused: list[tuple[ArrayFile, int]] = []
        self._signal: SimpleQueue[bool] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("address", "cache", "remedy", "_sizes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.cache = ShardCache(self.cache.folder, self.cache.limit)  # copy.copy would share the lease
        self._begin()

    def read(self, name: str) -> bytes:
        return self._ask(name, lambda system, path: bytes(system.cat_file(path)))

    def check(self, files: Iterable[tuple[ArrayFile, str]]) -> None:
        expected = {file.file: file.num_bytes(dtype) for file, dtype in files}
        unknown = [name for name in expected if name not in self._sizes]
        if len(unknown) > 1:  # all at once, where the file system can; what is wrong shows below
            system, folder = self._file_system()
            with suppress(Exception):  # file systems raise whatever their libraries do
                self._sizes.update(zip(unknown, system.sizes([f"{folder}/{name}" for name in unknown]), strict=True))
        for name, num_bytes in expected.items():
            if name not in self._sizes:
                self._sizes[name] = self._ask(name, lambda system, path: system.size(path))
            size = self._sizes[name]  # None: the server does not say
            if size not in (None, num_bytes):
                raise CorpusError(f"{self.address}/{name} has {size} bytes, its index says {num_bytes}")

    def path(self, file: ArrayFile, num_bytes: int) -> Path:
        path = self.cache.get(file.sha256, num_bytes, partial(self._fetch, file, num_bytes))
        assert path is not None
        return path

    def keep(self, files: list[tuple[ArrayFile, int]]) -> None:
        if self._process != os.getpid():  # forked, and threads are not
            self._begin()
        self.cache.hold(file.sha256 for file, _ in files)
        self._wanted, self._refused = deque(files), []
        if self._signal is None:
            self._signal = SimpleQueue()
            weakref.finalize(self, self._signal.put, False)
            threading.Thread(target=_fetch_ahead, args=(weakref.ref(self), self._signal), daemon=True).start()
        self._signal.put(True)

    def fetch_next(self) -> bool:
        """Fetch the next file that is wanted, unless somebody does or there is no room; False: each has been tried."""
        wanted, refused = self._wanted, self._refused  # which `keep` replaces
        if not wanted:
            wanted.extend(refused)
            refused.clear()
            return False
        file, num_bytes = wanted.popleft()
        try:
            if self.cache.get(file.sha256, num_bytes, partial(self._fetch, file, num_bytes), urgent=False) is None:
                refused.append((file, num_bytes))
        except UserError:
            pass  # whoever reads the file will try again, and say so
        except Exception:  # a fault of ours, which may not show then
            log.exception("%s/%s was not fetched ahead", self.address, file.file)
        return True

    @property
    def seconds_to_retry(self) -> float | None:
        """After which what was refused is to be tried again; None: nothing was."""
        return RETRY if self._wanted else None

    def _file_system(self) -> tuple[Any, str]:
        """(fsspec's file system, which it caches for each process and thread; the folder's path in it)."""
        protocol = self.address.partition("://")[0]
        try:
            system, path = url_to_fs(self.address, **_options(protocol))
        except ImportError as error:
            package = PACKAGES.get(protocol, protocol)
            raise Refused("data.path", self.address, f"{package} is not installed: pip install {package}") from error
        except ValueError as error:
            known = ", ".join(f"{name}://" for name in PACKAGES)
            raise Refused("data.path", self.address, f"{one_line(error)}; known are {known}") from error
        if protocol == "s3":
            system.retries = 1  # of its own; WAITS are ours
        return system, path.rstrip("/")

    def _fetch(self, file: ArrayFile, num_bytes: int, part: FileIO) -> None:
        """Go on with the file where it ends."""
        for _ in range(FETCHES):
            while (start := part.seek(0, os.SEEK_END)) < num_bytes:
                content = self._ask(file.file, partial(_range, start, num_bytes))
                if start + len(content) > num_bytes:  # all of it: the server knows no ranges
                    part.truncate(0)
                part.write(content)
            part.seek(0)
            if start == num_bytes and hashlib.file_digest(part, "sha256").hexdigest() == file.sha256:
                return
            part.truncate(0)
        remedy = "prepare the corpus again"
        raise CorpusError(f"{self.address}/{file.file} is damaged: its sha256 is not the index's; {remedy}")

    def _ask(self, name: str, question: Callable[[Any, str], T]) -> T:
        """question(file system, path of the file), until it is answered.

        Raises:
            CorpusError: it never is; names the address and the reason.
        """
        for attempt, wait in enumerate((*WAITS, None), start=1):
            try:
                system, folder = self._file_system()
                return question(system, f"{folder}/{name}")
            except UserError:
                raise
            except Exception as error:  # file systems raise whatever their libraries do
                if wait is None or _is_final(error):
                    tried = "" if _is_final(error) else f" ({attempt} attempt{'s' * (attempt > 1)})"
                    reason = f"{type(error).__name__}: {one_line(error) or one_line(error.__cause__)}"
                    raise CorpusError(f"{self.address}/{name} cannot be read: {reason}{tried}") from error
            time.sleep(wait)
        raise AssertionError


def _options(protocol: str) -> dict[str, dict[str, Any]]:
    """Of fsspec's file system: no request waits forever. The user's own (fsspec's configuration) come first."""
    if protocol == "s3":
        ours = {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT, "retries": {"total_max_attempts": 1}}
        name = "config_kwargs"
    elif protocol in ("http", "https", "gs", "gcs"):
        from aiohttp import ClientTimeout

        ours = {"timeout": ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)}
        name = "client_kwargs" if protocol.startswith("http") else "session_kwargs"
    else:
        return {}
    return {name: {**ours, **conf.get(protocol, {}).get(name, {})}}


def _range(start: int, num_bytes: int, system: Any, path: str) -> bytes:
    """The next CHUNK of a file of num_bytes, or all of it."""
    stop = min(start + CHUNK, num_bytes)
    content = bytes(system.cat_file(path, start=start, end=stop))
    if len(content) not in (stop - start, num_bytes):
        raise EOFError(f"{len(content)} bytes came instead of {stop - start}")
    return content


def _is_final(error: Exception) -> bool:
    """Whether asking again is of no use. fsspec calls all that HTTP servers say a missing file."""
    status = getattr(error, "status", getattr(error.__cause__, "status", None))
    status = getattr(getattr(error, "response", None), "status_code", status)  # huggingface_hub's
    if status is not None:
        return 400 <= status < 500 and status not in TRY_AGAIN
    connection = type(error.__cause__).__module__.startswith("aiohttp")
    return isinstance(error, FileNotFoundError | PermissionError) and not connection


def _fetch_ahead(storage: "weakref.ref[RemoteFolder]", signal: "SimpleQueue[bool]") -> None:
    """A thread's work: whenever there is a signal, all that is wanted, as long as the storage is there."""
    seconds: float | None = None
    while _next_signal(signal, seconds):
        while (folder := storage()) is not None and folder.fetch_next():
            del folder
        seconds = folder.seconds_to_retry if folder is not None else None
        del folder


def _next_signal(signal: "SimpleQueue[bool]", seconds: float | None) -> bool:
    """True also where none comes for so many seconds."""
    try:
        return signal.get(timeout=seconds)
    except Empty:
        return True


def open_storage(path: str, cache: ShardCache) -> Storage:
    """What reads the corpus at a path of this machine, or at an address."""
    return RemoteFolder(path, cache) if "://" in path else LocalFolder(Path(path))
