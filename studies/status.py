"""Say how far a study is: what is done, what failed, what is under way, and how long the rest will take.

    python -m studies.status study=placement_by_init
    python -m studies.status study=depth scale=gpu 'seeds=[0]'

Takes the overrides of studies.run.
"""

import statistics
import time

from rich.console import Console
from rich.table import Table

from core import cli
from core.printable import cell
from core.status import is_locked
from studies.record import Record
from studies.run import Plan, StudyConfig, is_done, known_runs, lock_of, planned


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
            table.add_row(cell(run.name), "broken off: resumes" if folder.exists() else "to do")
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    failed = sum(record.failed for record in done)
    print(f"{len(done)} of {len(done) + len(waiting)} runs have ended; training failed in {failed}.")
    known = [record.seconds for record in done if record.seconds is not None]
    if waiting and known:
        minutes = len(waiting) * statistics.fmean(known) / 60
        print(f"About {minutes:.0f} minutes of training are left, one run after the other.")


@cli.tool
def main(config: StudyConfig) -> None:
    show(planned(list(config.overrides)))


if __name__ == "__main__":
    cli.run(main)
