"""What a run's folder says of the run: callbacks.run_status writes it, tools.runs reads it without torch."""

import fcntl
import json
from pathlib import Path
from typing import Any

FILE = "status.json"
LOCK = ".running"
RUNNING, DONE, STOPPED, DIVERGED, FAILED = "running", "done", "stopped", "diverged", "failed"


def read(run_dir: Path) -> dict[str, Any]:
    """status.json as it stands; empty where there is none, or none that can be read."""
    try:
        content = json.loads((run_dir / FILE).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_running(run_dir: Path) -> bool:
    """Whether a process on this machine trains in the folder."""
    return is_locked(run_dir / LOCK)


def is_locked(path: Path) -> bool:
    """Whether a process on this machine holds flock's lock on the file; looking takes no lock away."""
    try:
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
