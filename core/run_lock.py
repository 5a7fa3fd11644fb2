"""One process at a time trains in a run's folder."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import ConfigError, writing

LOCK = "lock"


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """While it lasts, no other process gets the folder; a process that dies leaves it.

    Raises:
        ConfigError: another one has it, or it cannot be written to.
    """
    with writing("run_dir", run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / LOCK).open("w")
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # data-loader workers do not inherit this kind
        except BlockingIOError as error:
            raise ConfigError("run_dir", str(run_dir), "a folder in which no other process trains") from error
        except OSError:
            pass  # a file system without locks
        yield
