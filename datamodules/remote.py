"""A corpus that lies elsewhere (s3://, gs://, hf://, https://): whole shards, fetched ahead into a ShardCache."""

import hashlib
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from io import FileIO
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from fsspec.config import conf
from fsspec.core import url_to_fs

from core.errors import InvalidValue, UserError, one_line
from core.printable import printable
from core.untrusted import beyond, bound
from datamodules.index import ArrayFile, CorpusError
from datamodules.shard_cache import ShardCache
from datamodules.storage import LocalFolder, Storage

T = TypeVar("T")
log = logging.getLogger(__name__)
TIMEOUT = 10.0  # seconds after which a request to which nothing (more) comes has failed
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds after a failure, before the next attempt
RETRY = 1.0  # seconds after which a fetch ahead for which there was no room is tried again
CHUNK = 1 << 24  # bytes asked for at a time
PIECE = 1 << 20  # bytes held at a time of what comes by HTTP
PATIENCE, SLOWEST = 60.0, 1000.0  # seconds after which an answer has failed that brings fewer bytes a second
PARTIAL = 206  # the HTTP status of a range
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
        self.cache = ShardCache(self.cache.given, self.cache.limit)  # copy.copy would share the lease
        self._begin()

    def read(self, name: str, limit: int) -> bytes:
        def whole(system: Any, path: str) -> bytes:
            if _is_http(system):
                with _response(system, path) as response:
                    return b"".join(_pieces(response, most + 1))
            return bytes(system.cat_file(path, start=0, end=most + 1))

        most = bound(limit)
        content = self._ask(name, whole)
        if len(content) > most:
            raise CorpusError(beyond(f"{self.address}/{name} has more than {most:,} bytes", limit))
        return content

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
            log.exception("%s/%s was not fetched ahead", self.address, printable(file.file))
        return True

    @property
    def seconds_to_retry(self) -> float | None:
        """After which what was refused is to be tried again; None: nothing was."""
        return RETRY if self._wanted else None

    def _file_system(self) -> tuple[Any, str]:
        """Return (fsspec's file system, which it caches for each process and thread; the folder's path in it)."""
        protocol = self.address.partition("://")[0]
        if "::" in self.address:  # fsspec's chains of file systems, some of which write
            raise InvalidValue(
                "data.path", self.address, "an address of one file system; shards are cached as they are"
            )
        try:
            system, path = url_to_fs(self.address, **_options(protocol))
        except ImportError as error:
            package = PACKAGES.get(protocol, protocol)
            raise InvalidValue(
                "data.path", self.address, f"{package} is not installed: pip install {package}"
            ) from error
        except ValueError as error:
            known = ", ".join(f"{name}://" for name in PACKAGES)
            raise InvalidValue("data.path", self.address, f"{one_line(error)}; known are {known}") from error
        if protocol == "s3":
            system.retries = 1  # of its own; WAITS are ours
        return system, path.rstrip("/")

    def _fetch(self, file: ArrayFile, num_bytes: int, part: FileIO) -> None:
        """Go on with the file where it ends."""
        for _ in range(FETCHES):
            while part.seek(0, os.SEEK_END) < num_bytes:
                self._ask(file.file, partial(_append, part, num_bytes))
            whole = part.seek(0, os.SEEK_END) == num_bytes
            part.seek(0)
            if whole and hashlib.file_digest(part, "sha256").hexdigest() == file.sha256:
                return
            part.truncate(0)
        remedy = "prepare the corpus again"
        raise CorpusError(f"{self.address}/{file.file} is damaged: its sha256 is not the index's; {remedy}")

    def _ask(self, name: str, question: Callable[[Any, str], T]) -> T:
        """Return question(file system, path of the file), asked until it is answered.

        Raises:
            CorpusError: it never is; names the address and the reason.
        """
        is_http = self.address.startswith("http")
        for attempt, wait in enumerate((*WAITS, None), start=1):
            try:
                system, folder = self._file_system()
                return question(system, f"{folder}/{name}")
            except UserError:
                raise
            except Exception as error:  # file systems raise whatever their libraries do
                if wait is None or _is_final(error):
                    tried = "" if _is_final(error) else f" ({attempt} attempt{'s' * (attempt > 1)})"
                    raise CorpusError(
                        f"{self.address}/{name} cannot be read: {_reason(error, is_http)}{tried}"
                    ) from error
            time.sleep(wait)
        raise AssertionError


def _options(protocol: str) -> dict[str, dict[str, Any]]:
    """Return options of fsspec's file system by which no request waits forever; the user's own come first."""
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


def _append(part: FileIO, num_bytes: int, system: Any, path: str) -> None:
    """Add the next CHUNK of a file of num_bytes, or, of a server that knows no ranges, all that is missing."""
    start = part.seek(0, os.SEEK_END)
    stop = min(start + CHUNK, num_bytes)
    if not _is_http(system):
        content = bytes(system.cat_file(path, start=start, end=stop))
        if len(content) != stop - start:
            raise EOFError(f"{len(content)} bytes came instead of {stop - start}")
        part.write(content)
        return
    with _response(system, path, {"Range": f"bytes={start}-{stop - 1}"}) as response:
        if response.r.status == PARTIAL:
            said = str(response.r.headers.get("Content-Range", ""))
            if "Content-Encoding" in response.r.headers:
                raise EOFError("a part of the file came, compressed, which was not asked for")
            if said and not said.startswith(f"bytes {start}-"):
                raise EOFError(f"bytes {start} to {stop - 1} were asked for, and {one_line(said)} came")
        else:  # the whole file, compressed or not
            start, stop = 0, num_bytes
            part.truncate(0)
            part.seek(0)
        for piece in _pieces(response, stop - start):
            part.write(piece)
    came = part.seek(0, os.SEEK_END) - start
    if came != stop - start:
        raise EOFError(f"{came} bytes came instead of {stop - start}")


def _is_http(system: Any) -> bool:
    return "http" in system.protocol


def _response(system: Any, path: str, headers: Mapping[str, str] | None = None) -> Any:
    """Ask by HTTP; what comes is read piece by piece, so that a server decides neither how much it is nor how long.

    Nothing compressed is asked for: the size and the ranges of a file are then those of its own bytes.
    """
    own = {**system.kwargs.get("headers", {}), "Accept-Encoding": "identity", **(headers or {})}
    return system.open(path, "rb", block_size=0, size=1, headers=own)  # a size: it need not be asked for


def _pieces(response: Any, most: int) -> Iterator[bytes]:
    """Yield what comes, up to so many bytes.

    Raises:
        TimeoutError: it comes so slowly that it might never end.
    """
    began, came = time.monotonic(), 0
    while came < most and (piece := response.read(min(PIECE, most - came))):
        came += len(piece)
        yield piece
        seconds = time.monotonic() - began
        if seconds > PATIENCE and came < SLOWEST * seconds:
            raise TimeoutError(f"only {came} bytes came in {seconds:.0f} s")


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error is about; fsspec calls all that servers say a missing file."""
    status = getattr(error, "status", getattr(error.__cause__, "status", None))
    status = getattr(getattr(error, "response", None), "status_code", status)  # huggingface_hub's
    return status if isinstance(status, int) else None


def _is_final(error: Exception) -> bool:
    """Return whether asking again is of no use."""
    status = _status(error)
    if status:
        return 300 <= status < 500 and status not in TRY_AGAIN
    if _redirected(error):
        return True
    connection = type(error.__cause__).__module__.startswith("aiohttp")
    return isinstance(error, FileNotFoundError | PermissionError) and not connection


def _redirected(error: BaseException) -> bool:
    return "TooManyRedirects" in (type(error).__name__, type(error.__cause__).__name__)


def _reason(error: Exception, is_http: bool) -> str:
    """Return why, in words: of what HTTP servers say the status, which fsspec hides behind FileNotFoundError."""
    hidden = is_http and isinstance(error, FileNotFoundError) and error.__cause__ is not None
    told: BaseException = (error.__cause__ or error) if hidden else error
    if _redirected(error):
        return "it is redirected too often"
    status = _status(error)
    if status and type(told).__module__.startswith("aiohttp"):  # whose text has the whole address, signature included
        return one_line(f"HTTP status {status} {getattr(told, 'message', '')}")
    if is_http and isinstance(told, FileNotFoundError):
        return "HTTP status 404 Not Found"
    return f"{type(told).__name__}: {one_line(told) or one_line(told.__cause__)}"


def _fetch_ahead(storage: "weakref.ref[RemoteFolder]", signal: "SimpleQueue[bool]") -> None:
    """Fetch all that is wanted whenever there is a signal, as long as the storage is there; a thread's work."""
    seconds: float | None = None
    while _next_signal(signal, seconds):
        while (folder := storage()) is not None and folder.fetch_next():
            del folder
        seconds = folder.seconds_to_retry if folder is not None else None
        del folder


def _next_signal(signal: "SimpleQueue[bool]", seconds: float | None) -> bool:
    """Return whether a signal has come, or none for so many seconds."""
    try:
        return signal.get(timeout=seconds)
    except Empty:
        return True


def open_storage(path: str, cache: ShardCache) -> Storage:
    """Return what reads the corpus at a path of this machine, or at an address."""
    return RemoteFolder(path, cache) if "://" in path else LocalFolder(Path(path))
