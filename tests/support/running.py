"""What Linux says of processes that run, and of locks that are held."""

import fcntl
import signal
from contextlib import suppress
from pathlib import Path

from core.signals import STOPPING


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


def stopping(pid: int, which: str) -> set[signal.Signals]:
    """Those of STOPPING in a mask of the process' main thread.

    "SigBlk" are held back, "ShdPnd" sent and not yet taken; for "SigCgt" the process has handlers.
    """
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {signum for signum in STOPPING if int(fields[which], 16) >> (signum - 1) & 1}


def with_text(text: str) -> list[int]:
    """Return the processes that have the text in their command line."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            with suppress(FileNotFoundError, ProcessLookupError):
                found += [int(path.name)] if text in command_line(int(path.name)) else []
    return found
