"""List runs: what became of each, how far it is, its loss, its age.

    python -m tools.runs                                 all below runs/, the newest last
    python -m tools.runs runs/moe_spannorm sort=loss     the best first
    python -m tools.runs status=running,failed
    python -m tools.runs where=[model.placement=spannorm,dirty=false] columns=[optim.lr,commit] sort=optim.lr
    python -m tools.runs output=runs.csv                 and every setting, as a table for a program; or .json

Reads only; a run may go on meanwhile. Age is the time since anything was last written to the run.
"""

import csv
import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from core import cli
from core.atomic_write import write_whole
from core.dataclass_cli import FIRST
from core.errors import require
from core.event_files import OLDER, event_files
from core.printable import cell, printable
from core.provenance import FIELDS, OF_THE_USER
from core.status import (
    DIVERGED,
    DONE,
    FAILED,
    KILLED,
    RUNNING,
    STOPPED,
    SUMMARY,
    TIMED_OUT,
    is_running,
    read,
    read_origin,
    read_summary,
)
from core.untrusted import Untrusted, bound
from tools.run_facts import as_text, facts

STYLES = {
    RUNNING: "cyan",
    DONE: "green",
    STOPPED: "yellow",
    TIMED_OUT: "yellow",
    DIVERGED: "red",
    FAILED: "red",
    KILLED: "red",
}
WRITTEN = ("status.json", "summary.json", "divergence.md", "events.jsonl", "checkpoints", "config.yaml", OLDER)
WAS_KILLED = "its process was killed (kill -9, no memory left, or the machine went down)"
FRESH_SECONDS = 60.0
"""So long after its last word a run of another machine counts as running, whose lock may not be seen from here."""
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
        where: list only runs of these settings and origins: model.placement=spannorm, or commit=3a5f, its beginning.
        columns: settings (optim.lr) and origins (commit, torch, device, host, command, ...) that are shown as well.
        sort: put the newest last (age), the best first (loss), or the smallest of a setting or origin.
        output: a file for the same rows, with all settings and origins: .csv or .json.
    """

    folder: Path = field(default=Path("runs"), metadata=FIRST)
    status: tuple[Literal["running", "done", "stopped", "timed_out", "diverged", "failed", "killed"], ...] = ()
    where: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    sort: str = "age"
    output: Path | None = None


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        status: a word of STYLES.
        val_loss: the last one known.
        seconds: since something was written.
        reason: why it ended early, in a line.
        facts: its settings and origins, as tools.run_facts has them; empty where nobody asks for them.
    """

    folder: Path
    status: str
    step: int | None
    max_steps: int | None
    val_loss: float | None
    seconds: float
    reason: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def look(folder: Path, now: float) -> Row | None:
    """Return what the folder says; a run without status.json is judged by what else it has left.

    None: it is gone by now.
    """
    paths = (*(folder / name for name in WRITTEN), *event_files(folder))
    written = [seconds for path in paths if (seconds := _modified(path)) is not None]
    if not written:
        return None
    status = read(folder)
    if not status:
        return _without_status(folder, now - max(written))
    state, reason = str(status.get("status")), str(status.get("reason") or "")
    if is_running(folder):
        state, reason = RUNNING, ""
    elif state in (RUNNING, KILLED):
        state, reason = _without_lock(folder, now - max(written))
    elif state not in STYLES:
        state, reason = FAILED, f"its status is of another version: {state}"
    step, max_steps, val_loss = status.get("step"), status.get("max_steps"), status.get("val_loss")
    return Row(folder, state, step, max_steps, val_loss, now - max(written), reason)


def _without_lock(folder: Path, seconds: float) -> tuple[str, str]:
    """Return the status, and why, of a run that says it is running and whose lock nobody holds, as seen from here."""
    host = read_origin(folder).get("host")
    if host in (None, platform.node()):
        return KILLED, WAS_KILLED
    if seconds < FRESH_SECONDS:
        return RUNNING, ""
    return KILLED, f"{WAS_KILLED}; or it trains on {host}, whose locks this machine may not see"


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


def is_wanted(row: Row, where: Sequence[str]) -> bool:
    """Return whether a run has all the settings and origins."""
    for name, _, value in (condition.partition("=") for condition in where):
        found = as_text(row.facts[name]) if name in row.facts else None
        if found != value and not (name == "commit" and found is not None and value and found.startswith(value)):
            return False
    return True


def in_order(rows: Sequence[Row], by: str) -> list[Row]:
    """Return the rows, sorted: numbers before text, runs that have no such thing last."""
    if by == "age":
        return sorted(rows, key=lambda row: -row.seconds)
    if by == "loss":
        return sorted(rows, key=lambda row: math.inf if row.val_loss is None else row.val_loss)

    def key(row: Row) -> tuple[int, float, str]:
        value = row.facts.get(by)
        if isinstance(value, int | float) and math.isfinite(value):
            return 0, value, ""
        return (2, 0.0, "") if value is None else (1, 0.0, as_text(value))

    return sorted(rows, key=key)


def export(rows: Sequence[Row], output: Path) -> None:
    """Write all that is known of the runs, one after the other, as CSV or JSON by the file's ending."""
    basic = ("status", "step", "max_steps", "val_loss", "reason")
    content = [{"run": str(row.folder), **{name: getattr(row, name) for name in basic}, **row.facts} for row in rows]
    if output.suffix == ".json":
        text = json.dumps(content, indent=1, default=as_text) + "\n"
        write_whole(output, lambda unfinished: unfinished.write_text(text))
        return
    names = list(dict.fromkeys(name for row in content for name in row))

    def write(unfinished: Path) -> None:
        with unfinished.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(map(_harmless, names))
            writer.writerows([_harmless(row.get(name)) for name in names] for row in content)

    write_whole(output, write)


def _harmless(value: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula: a run's text may come from anywhere."""
    if value is None or isinstance(value, bool | int | float):
        return value
    text = as_text(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def make_table(rows: list[Row], root: Path, columns: Sequence[str] = ()) -> Table:
    """Make one row a run."""
    table = Table()
    table.add_column("run", overflow="fold")
    table.add_column("status")
    for column in ("step", "val loss", "age"):
        table.add_column(column, justify="right")
    for column in columns:
        table.add_column(cell(column), overflow="fold")
    for row in rows:
        steps = "-" if row.step is None else f"{row.step}/{row.max_steps}" if row.max_steps else str(row.step)
        loss = "-" if row.val_loss is None else f"{row.val_loss:.4f}"
        status = Text(row.status, style=STYLES[row.status])
        more = (cell(_short(column, row.facts[column])) if column in row.facts else "-" for column in columns)
        table.add_row(cell(_name(row, root)), status, steps, loss, age(row.seconds), *more)
    return table


def _short(name: str, value: Any) -> str:
    """Return a cell; of a commit its beginning, which `where` takes, too."""
    return as_text(value)[:12] if name == "commit" else as_text(value)


def reasons(rows: list[Row], root: Path) -> list[str]:
    """Return why each run ended early that did, a line each: beside the rest it would be many."""
    return [printable(f"{_name(row, root)}: {row.reason}") for row in rows if row.reason]


def _name(row: Row, root: Path) -> Path:
    return row.folder.relative_to(root) if row.folder != root else row.folder


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
    for condition in config.where:
        require(
            "=" in condition[1:], "where", condition, "a list of NAME=VALUE, as [model.placement=spannorm,dirty=false]"
        )
    if config.output is not None:
        require(
            config.output.suffix in (".csv", ".json"), "output", str(config.output), "a name that ends in .csv or .json"
        )
    now = time.time()
    seen = [look(folder, now) for folder in find(config.folder)]
    rows = [row for row in seen if row is not None and (not config.status or row.status in config.status)]
    asked = [*(condition.partition("=")[0] for condition in config.where), *config.columns]
    asked += [config.sort] if config.sort not in ("age", "loss") else []
    if asked or config.output is not None:
        rows = [replace(row, facts=facts(row.folder)) for row in rows]
        known = {name for row in rows for name in row.facts}
        for name in asked if rows else ():
            asked_by = "sort" if name == config.sort else "columns" if name in config.columns else "where"
            near = "".join(f"; did you mean {found}?" for found in get_close_matches(name, known, 1))
            origins = ", ".join((*FIELDS, *OF_THE_USER))
            also = "age, loss, " if asked_by == "sort" else ""
            valid = f"{also}a setting in one of their config.yaml, as optim.lr, or one of {origins}{near}"
            require(name in known, asked_by, name, valid)
    rows = in_order([row for row in rows if is_wanted(row, config.where)], config.sort)
    console = Console(width=None if Console().is_terminal else 160)
    console.print(
        make_table(rows, config.folder, config.columns) if rows else cell(f"No such runs in {config.folder}.")
    )
    for line in reasons(rows, config.folder):
        print(line)
    if config.output is not None:
        export(rows, config.output)
        print(f"Written: {printable(config.output, limit=None)}")


if __name__ == "__main__":
    cli.run(main)
