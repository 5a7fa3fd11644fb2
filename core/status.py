"""What a run's folder says of the run: callbacks.run_status and core.run_lock write it, tools.runs reads it without
torch."""

import fcntl
import json
from pathlib import Path
from typing import Any

FILE = "status.json"
LOCK = "lock"
RUNNING, DONE, STOPPED, DIVERGED, FAILED = "running", "done", "stopped", "diverged", "failed"


def read(run_dir: Path) -> dict[str, Any]:
    """status.json as it stands; empty where there is none, or none that can be read."""
    try:
        content = json.loads((run_dir / FILE).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_done(run_dir: Path, step: int) -> bool:
    """Whether the run has ended well at this step. That is noted last of all, when all else is written."""
    status = read(run_dir)
    return status.get("status") == DONE and status.get("step") == step


def is_running(run_dir: Path) -> bool:
    """Whether a process on this machine trains in the folder."""
    return is_locked(run_dir / LOCK)


def is_locked(path: Path) -> bool:
    """Whether a process on this machine holds flock's lock on the file; looking takes no lock away."""
    try:
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
