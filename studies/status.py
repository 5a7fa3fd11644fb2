"""Say how far a study is: what is done, what failed, what is under way, and how long the rest will take.

    python -m studies.status study=placement_by_init
    python -m studies.status study=depth scale=gpu 'seeds=[0]'

Takes the overrides of studies.run.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from core import cli
from core.printable import cell
from core.status import DONE, RUNNING, is_locked
from studies.grid import Planned
from studies.plan import Plan, StudyConfig, is_done, known_runs, lock_of, planned
from studies.record import Record
from tools.runs import look

MAX_STEPS = "trainer.max_steps"
EVERY = ""
"""Stands for all schemes; no label is empty."""


def show(plan: Plan) -> None:
    """Print it."""
    study = plan.study
    done, waiting = [], []
    table = Table("run", "state", "validation loss", "seconds", title=cell(f"{study.name}, {study.scale}"))
    for run in known_runs(plan):
        path, folder = plan.record_of(run), plan.runs / run.name
        if is_done(path, run):
            record = Record.load(path)
            done.append(record)
            seconds = "" if record.seconds is None else f"{record.seconds:.0f}"
            table.add_row(
                cell(run.name), record.status, "" if record.val_loss is None else f"{record.val_loss:.4f}", seconds
            )
        elif is_locked(lock_of(folder)):
            waiting.append(run)
            table.add_row(
                cell(run.name),
                f"running for {time.time() - folder.stat().st_ctime:.0f} s" if folder.exists() else "starting",
            )
        else:
            waiting.append(run)
            table.add_row(cell(run.name), broken_off(folder) if folder.exists() else "to do")
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    failed = sum(record.failed for record in done)
    print(f"{len(done)} of {len(done) + len(waiting)} runs have ended; training failed in {failed}.")
    print(hours(done, waiting))


def broken_off(folder: Path) -> str:
    """Return in what way a run has ended that the study starts again."""
    row = look(folder, time.time())
    how = "broken off" if row is None or row.status in (RUNNING, DONE) else row.status.replace("_", " ")
    return f"{how}{f' at step {row.step}' if row is not None and row.step else ''}: resumes"


def hours(done: Sequence[Record], waiting: Sequence[Planned]) -> str:
    """Return how long the runs that have ended took, and how long the others will, one after the other.

    A run to come takes as long per step as those of its scheme have taken on average, else as those of all schemes.
    """
    took = sum(record.seconds or 0.0 for record in done)
    text = f"Trained for {_hours(took)}"
    per_step: dict[str, list[float]] = {}
    for record in done:
        if record.seconds is not None and record.train_loss[0]:
            pace = record.seconds / record.train_loss[0][-1]
            for scheme in (next(iter(record.point.values()), ""), EVERY):
                per_step.setdefault(scheme, []).append(pace)
    lengths = [_steps(run.overrides) for run in waiting]
    usual = max((record.train_loss[0][-1] for record in done if record.train_loss[0]), default=None)
    left = 0.0
    for run, length in zip(waiting, lengths, strict=True):
        paces = per_step.get(next(iter(run.point.values()), "")) or per_step.get(EVERY)
        steps = length or usual
        if paces is None or steps is None:
            return f"{text}; nothing says yet how long the rest will take."
        left += statistics.fmean(paces) * steps
    rest = f"about {_hours(left)} are left, one run after the other" if waiting else "nothing is left"
    return f"{text}; {rest}."


def _steps(overrides: Sequence[str]) -> int | None:
    """Return the length of a run, where its overrides name it: the last that does counts."""
    lengths = [value for name, _, value in (given.partition("=") for given in overrides) if name == MAX_STEPS]
    return int(lengths[-1]) if lengths and lengths[-1].isdecimal() else None


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes"


@cli.tool
def main(config: StudyConfig) -> None:
    show(planned(list(config.overrides)))


if __name__ == "__main__":
    cli.run(main)
