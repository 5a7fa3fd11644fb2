"""Keeps a run's status in its folder: callbacks.run_status and core.run_lock write it, tools.runs reads it without
torch."""

import fcntl
import math
import os
from pathlib import Path
from typing import Any

from core.provenance import FIELDS, OF_THE_USER
from core.provenance import FILE as ORIGIN
from core.untrusted import MIB, Untrusted, read_json

FILE = "status.json"
SUMMARY = "summary.json"
LOCK = "lock"
FILE_BYTES = MIB
"""The most bytes of either file that is read; they have a few hundred."""
RUNNING, DONE = "running", "done"
STOPPED, TIMED_OUT = "stopped", "timed_out"  # by a signal or a callback; by its own time, or a scheduler's SIGUSR1
DIVERGED, FAILED = "diverged", "failed"
KILLED = "killed"  # which nobody lived to write: `running`, and no process holds the folder's lock
EARLY = (STOPPED, TIMED_OUT)
"""Ends before the last step that are no failures."""


COUNTS = ("step", "max_steps", "steps", "tokens", "images", "parameters", "active_parameters")
FIGURES = (
    "train_loss",
    "val_loss",
    "val_perplexity",
    "val_bits_per_byte",
    "bigram_loss",
    "unigram_loss",
    "tokens_per_second",
    "images_per_second",
    "seconds",
    "total_seconds",
)
WORDS = ("status", "reason", "loss_unit", "main")
MEASURED = "figures"
"""Numbers by name: what a task measures beside the loss (core.task.Task.figures)."""
PROVENANCE = "provenance"
MAX_WORD = 1000
"""Characters of a text among what a summary says of where it comes from."""
MAX_COMMAND = 100_000
"""Characters of a command line."""


def read(run_dir: Path) -> dict[str, Any]:
    """Return status.json as it stands, less what is not of its type; empty where there is none that can be read."""
    try:
        return _typed(read_json(run_dir / FILE, limit=FILE_BYTES))
    except Untrusted:
        return {}


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Return the numbers of summary.json: counts are integers, figures finite floats. Empty: the run has not ended.

    Raises:
        Untrusted: it cannot be read, or one of them is no such number: names it.
    """
    path = run_dir / SUMMARY
    if not path.exists():
        return {}
    content = read_json(path, limit=FILE_BYTES)
    if not isinstance(content, dict):
        raise Untrusted(f"{path} is no summary of a run: expected an object")
    found = _typed(content)
    for field in (*COUNTS, *FIGURES):
        if content.get(field) is not None and field not in found:
            valid = "an integer >= 0" if field in COUNTS else "a finite number"
            raise Untrusted(f"{path}: {field}={content[field]!r} is not valid: expected {valid}, or null")
    return found


def read_origin(run_dir: Path) -> dict[str, Any]:
    """Return where a run comes from: core.provenance.FIELDS and OF_THE_USER, as far as they are known.

    Of the process that trained it last. A run that was begun by a script of one's own has it in its summary alone.
    """
    try:
        found = read_summary(run_dir).get(PROVENANCE, {})
    except Untrusted:
        found = {}
    names = (path.name for path in run_dir.glob(f"{Path(ORIGIN).stem}*.json"))
    newest = max(names, key=lambda name: (name != ORIGIN, name), default=None)  # -resumed-TIME behind the first one
    try:
        content = read_json(run_dir / newest, limit=FILE_BYTES) if newest else {}
    except Untrusted:
        return found
    noted = content if isinstance(content, dict) else {}
    limits = {name: MAX_COMMAND if name == "command" else MAX_WORD for name in (*FIELDS, *OF_THE_USER)}
    return {**found, **{name: noted[name] for name, limit in limits.items() if _is_short(noted.get(name), limit)}}


def _typed(content: Any) -> dict[str, Any]:
    """Return the known fields that are of their type, others left out."""
    found: dict[str, Any] = {}
    for field, value in content.items() if isinstance(content, dict) else ():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if field in COUNTS and isinstance(value, int) and number and 0 <= value < 2**63:
            found[field] = value
        elif field in FIGURES and _is_figure(value):
            found[field] = float(value)
        elif field in WORDS and isinstance(value, str):
            found[field] = value
        elif field == MEASURED and isinstance(value, dict):
            found[field] = {name: float(figure) for name, figure in value.items() if _is_figure(figure)}
        elif field == PROVENANCE and isinstance(value, dict):
            found[field] = {name: value[name] for name in FIELDS if _is_short(value.get(name))}
    return found


def _is_figure(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < 1e300 and math.isfinite(value)


def _is_short(value: Any, limit: int = MAX_WORD) -> bool:
    return (isinstance(value, bool | int) and abs(value) < 2**63) or (isinstance(value, str) and len(value) <= limit)


def is_done(run_dir: Path, step: int) -> bool:
    """Return whether the run has ended well at this step. That is noted last of all, when all else is written."""
    status = read(run_dir)
    return status.get("status") == DONE and status.get("step") == step


def is_running(run_dir: Path) -> bool:
    """Return whether a process on this machine trains in the folder."""
    return is_locked(run_dir / LOCK)


def is_locked(path: Path) -> bool:
    """Return whether a process on this machine holds flock's lock on the file, without taking one or waiting."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
