"""List runs: what became of each, how far it is, its loss, its age.

    python -m tools.runs                                 all below runs/, the newest last
    python -m tools.runs runs/moe_spannorm sort=loss     the best first
    python -m tools.runs status=running,failed

Reads only; a run may go on meanwhile. Age is the time since anything was last written to the run.
"""

import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from core import cli
from core.dataclass_cli import FIRST
from core.errors import require
from core.printable import cell, printable
from core.status import DIVERGED, DONE, FAILED, RUNNING, STOPPED, SUMMARY, is_running, read, read_summary
from core.untrusted import Untrusted, bound

STYLES = {RUNNING: "cyan", DONE: "green", STOPPED: "yellow", DIVERGED: "red", FAILED: "red"}
WRITTEN = ("status.json", "summary.json", "divergence.md", "events.jsonl", "checkpoints", "config.yaml", "tensorboard")
KILLED = "the process was killed"
DEEP, BEHIND_LINKS = 8, 2
"""Levels of folders that are looked at, and of those how many behind a link, which may lead anywhere."""
MOST = 100_000
"""Folders that are looked at."""


@dataclass(frozen=True)
class RunsConfig:
    """Holds the fields that `python -m tools.runs` takes.

    Attributes:
        folder: the folder to look in.
        status: list only runs that are this.
        sort: put the newest last (age), or the best first (loss).
    """

    folder: Path = field(default=Path("runs"), metadata=FIRST)
    status: tuple[Literal["running", "done", "stopped", "diverged", "failed"], ...] = ()
    sort: Literal["age", "loss"] = "age"


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        status: running, done, stopped, diverged or failed.
        val_loss: the last one known, in nats per token.
        seconds: since something was written.
        reason: why it ended early, in a line.
    """

    folder: Path
    status: str
    step: int | None
    max_steps: int | None
    val_loss: float | None
    seconds: float
    reason: str


def look(folder: Path, now: float) -> Row | None:
    """Return what the folder says; a run without status.json is judged by what else it has left.

    None: it is gone by now.
    """
    written = [seconds for name in WRITTEN if (seconds := _modified(folder / name)) is not None]
    if not written:
        return None
    status = read(folder)
    if not status:
        return _without_status(folder, now - max(written))
    state, reason = str(status.get("status")), str(status.get("reason") or "")
    if is_running(folder):
        state, reason = RUNNING, ""
    elif state not in STYLES or state == RUNNING:
        state, reason = FAILED, KILLED
    step, max_steps, val_loss = status.get("step"), status.get("max_steps"), status.get("val_loss")
    return Row(folder, state, step, max_steps, val_loss, now - max(written), reason)


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except (OSError, ValueError):  # not there, or not any more
        return None


def _without_status(folder: Path, seconds: float) -> Row:
    try:
        summary = read_summary(folder) if (folder / SUMMARY).is_file() else None
    except Untrusted:
        summary = None
    if summary is not None:
        return Row(folder, DONE, summary.get("steps"), None, summary.get("val_loss"), seconds, "")
    diverged = (folder / "divergence.md").exists()
    status = RUNNING if is_running(folder) else DIVERGED if diverged else FAILED
    return Row(folder, status, None, None, None, seconds, "" if status == DIVERGED else "it left no status")


def find(root: Path) -> list[Path]:
    """Return the run folders at and below a folder: those that hold a config.yaml. Does not look inside of runs.

    Each run is found once, whatever links lead to it, and no more than DEEP levels of them, BEHIND_LINKS behind
    a link, and MOST in all, which is said.
    """
    runs: list[Path] = []
    seen: dict[tuple[int, int], int] = {}  # how many levels below it were looked at: another way may lead deeper
    waiting, linked = [(root, DEEP)], list[tuple[Path, int]]()
    most = bound(MOST)
    while waiting or linked:  # links last: of a folder and a link to it, the folder's own name counts
        folder, levels = (waiting or linked).pop()
        try:
            status = folder.stat()
            place = (status.st_dev, status.st_ino)
            if seen.get(place, -1) >= levels:
                continue
            is_new, seen[place] = place not in seen, levels
            if (folder / "config.yaml").is_file():
                runs += [folder] if is_new else []
                continue
            if levels == 0:
                continue
            below = [path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir()]
            links = sorted(path for path in below if path.is_symlink())
        except (OSError, ValueError):  # moved away meanwhile, or not ours to read
            continue
        waiting += [(path, levels - 1) for path in below if path not in links]
        linked += [(path, min(levels - 1, BEHIND_LINKS)) for path in links]
        if len(seen) > most:
            print(f"Only the first {most:,} folders below {printable(root)} were looked at.", file=sys.stderr)
            break
    return sorted(runs)


def make_table(rows: list[Row], root: Path) -> Table:
    """Make one row a run."""
    table = Table()
    table.add_column("run", overflow="fold")
    table.add_column("status")
    for column in ("step", "val loss", "age"):
        table.add_column(column, justify="right")
    table.add_column("why")
    for row in rows:
        steps = "-" if row.step is None else f"{row.step}/{row.max_steps}" if row.max_steps else str(row.step)
        loss = "-" if row.val_loss is None else f"{row.val_loss:.4f}"
        name = row.folder.relative_to(root) if row.folder != root else row.folder
        status = Text(row.status, style=STYLES[row.status])
        table.add_row(cell(name), status, steps, loss, age(row.seconds), cell(row.reason))
    return table


def age(seconds: float) -> str:
    """Return the age in the largest unit that gives at least one: 40s, 12m, 5h, 3d."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{max(0, int(seconds))}s"


@cli.tool
def main(config: RunsConfig) -> None:
    there = os.path.isdir(config.folder)  # unlike Path.is_dir, also of names that no file can have
    require(there, "FOLDER", str(config.folder), "a folder with runs")
    now = time.time()
    seen = [look(folder, now) for folder in find(config.folder)]
    rows = [row for row in seen if row is not None and (not config.status or row.status in config.status)]
    if config.sort == "loss":
        rows.sort(key=lambda row: math.inf if row.val_loss is None else row.val_loss)
    else:
        rows.sort(key=lambda row: -row.seconds)
    console = Console(width=None if Console().is_terminal else 160)
    console.print(make_table(rows, config.folder) if rows else cell(f"No such runs in {config.folder}."))


if __name__ == "__main__":
    cli.run(main)
