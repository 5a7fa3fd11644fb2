"""What Linux says of processes that run, and of locks that are held."""

import fcntl
from contextlib import suppress
from pathlib import Path


def is_held(lock: Path) -> bool:
    """Return whether somebody holds the lock."""
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def command_line(process: int) -> str:
    return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def with_text(text: str) -> list[int]:
    """Return the processes that have the text in their command line."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            with suppress(FileNotFoundError, ProcessLookupError):
                found += [int(path.name)] if text in command_line(int(path.name)) else []
    return found
