"""One process at a time trains in a run's folder, and whoever looks at the folder sees that one does."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from core.errors import ConfigError, writing
from core.status import LOCK

LOOK_SECONDS = 0.2  # a look at the lock takes far less


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Keep other processes out of the folder in the context; a process that dies leaves it.

    Raises:
        ConfigError: another one has it, or it cannot be written to.
    """
    lock = _acquire(run_dir)
    os.register_at_fork(after_in_child=lock.close)  # a data-loader process may outlive a killed run by seconds
    with lock:
        yield


def _acquire(run_dir: Path) -> TextIO:
    with writing("run_dir", run_dir):
        while True:
            lock = _open(run_dir)
            if not _taken(lock.fileno()):
                time.sleep(LOOK_SECONDS)  # it may have been no run, but a look
                if not _taken(lock.fileno()):
                    lock.close()
                    raise ConfigError("run_dir", str(run_dir), "a folder in which no other process trains")
            if _is_there(run_dir, lock):
                return lock
            lock.close()  # of a run that was refused, which has removed its folder before we had the lock


def _open(run_dir: Path) -> TextIO:
    while True:
        run_dir.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # removed in between
            # Neither waits for a pipe nor follows a link: a folder from elsewhere could have either under this name.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            return os.fdopen(os.open(run_dir / LOCK, flags, 0o666), "w")


def _is_there(run_dir: Path, lock: TextIO) -> bool:
    """Return whether the open file is the one that others find: a lock on a file without a name keeps nobody out."""
    try:
        return os.path.samestat((run_dir / LOCK).stat(), os.fstat(lock.fileno()))
    except FileNotFoundError:
        return False


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True
