"""Run a study: every run of its grid that has no record yet, each in a process of its own.

    python -m studies.run study=placement_by_init                          as many at once as there are cores, or GPUs
    python -m studies.run study=learning_rate hydra.launcher.n_jobs=2 'seeds=[0]'
    python -m studies.run study=depth scale=gpu hydra/launcher=submitit_slurm hydra.launcher.partition=NAME

Hydra's launchers do the running; on a machine with GPUs each run has as many as it trains on, and waits for them. A run
that was killed resumes from its last checkpoint. One that was refused, as of a folder that cannot be written to, or had
not the memory is no result either, and is run again. One that crashed is recorded as broken, and the rest goes on.
What follows on a selection waits until all that it selects from has its record. `python -m studies.status` says how far
it is.
"""

import fcntl
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

import hydra
from omegaconf import DictConfig, OmegaConf

from core import cli
from core.errors import ConfigError, UserError, one_line, suggest
from core.interruption import PEER_LOST
from core.printable import printable
from core.run_folder import LAST
from core.saved_config import texts
from core.status import SUMMARY, TIMED_OUT
from core.status import read as read_status
from lightning_modules.composing import compose_run
from studies.checking import check_runs
from studies.composing import composing_anew
from studies.decay import LARGEST_BUILT, measure
from studies.devices import gpus_wanted, taken, visible_gpus
from studies.grid import Planned
from studies.plan import (
    Plan,
    StudyConfig,
    is_done,
    known_runs,
    lock_of,
    plan_of,
    planned,
    rounds,
    settings_of,
    was_begun_as,
)
from studies.record import BROKEN, Record, collect, storable
from studies.warm import TRAIN, Ended, warm_process

NAMED = 5
"""Of the runs without a result; the status has them all."""


@hydra.main(version_base="1.3", config_path="../configs", config_name="study")
@cli.job
def run_one(config: DictConfig) -> None:
    """Train the run named `run`, as a job of the sweep."""
    plan = plan_of(config)
    runs = {run.name: run for run in known_runs(plan)}
    if config.run not in runs:
        raise ConfigError("run", config.run, suggest(str(config.run), runs))
    run = runs[config.run]
    folder, path = plan.runs / run.name, plan.record_of(run)
    with held(folder) as lock:
        if not is_done(path, run):
            put_aside(run, folder, path)
            record = train(run, folder, config.threads, lock)
            if isinstance(record, str):
                print(f"{run.name}: {printable(record)}", flush=True)
                return
            record = with_outcomes(with_decay(record), folder, plan.outcomes)
            record.save(path)
            print(f"{run.name}: {record.status}{f', {printable(record.reason)}' if record.reason else ''}", flush=True)
        elif lacks_outcomes(plan, run):
            with_outcomes(Record.load(path), folder, plan.outcomes).save(path)
            print(f"{run.name}: measured", flush=True)


def with_decay(record: Record) -> Record:
    """Return the record with its model's gradient at initialization measured, unless it is too large for that.

    It is measured here, where the overrides are the user's own: a report only reads.
    """
    if record.status == BROKEN or not 0 < (record.parameters or 0) <= LARGEST_BUILT:
        return record
    try:
        return replace(record, decay=measure(record.overrides, record.seed))
    except Exception as error:  # a backend or a device that only training has: a trained run keeps its record
        print(
            f"{record.name}: no gradient at initialization: {printable(one_line(error))}", file=sys.stderr, flush=True
        )
        return record


def with_outcomes(record: Record, folder: Path, outcomes: tuple[str, ...]) -> Record:
    """Return the record with these outcomes of the run's last weights measured, unless it failed or has none.

    One that is no number is kept as None: it would be none again.
    """
    if not outcomes or record.failed or not (folder / LAST).exists():
        return record
    from tools.examination.examine import outcomes_of

    try:
        found = outcomes_of(folder, outcomes, allow=named(record), device="cpu")  # the GPUs are other runs'
    except Exception as error:  # a trained run keeps its record
        print(f"{record.name}: no outcomes: {printable(one_line(error))}", file=sys.stderr, flush=True)
        return record
    kept = {name: storable(value) for name, value in found.items()}
    return replace(record, outcomes={**record.outcomes, **kept})


def named(record: Record) -> frozenset[str]:
    """Return the texts in a run's configuration as its overrides compose it: what they name, the user vouches for."""
    with composing_anew():
        return frozenset(texts(OmegaConf.to_container(compose_run(record.overrides))))


def lacks_outcomes(plan: Plan, run: Planned) -> bool:
    """Return whether there are outcomes to measure of a run that has its record, and whose folder is still there."""
    if not plan.outcomes or not (plan.runs / run.name / LAST).exists():
        return False
    record = Record.load(plan.record_of(run))
    return not record.failed and not set(plan.outcomes) <= set(record.outcomes)


@contextmanager
def held(folder: Path) -> Iterator[IO[str]]:
    """Wait until nobody else runs in the folder. The training process has the lock too: it outlives a killed study."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(lock_of(folder), "w") as lock:
        os.set_inheritable(lock.fileno(), True)
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def put_aside(run: Planned, folder: Path, path: Path) -> None:
    """Rename the run's folder and its record where they are of other settings than are planned now."""
    for there, same in ((folder, was_begun_as(run, folder)), (path, not path.exists())):
        if not same:
            ending = there.name.removeprefix(run.name)
            free = (there.with_name(f"{run.name}.earlier{number}{ending}") for number in itertools.count(1))
            kept = there.rename(next(name for name in free if not name.exists()))
            print(f"{run.name}: what lay there is of other settings, and is kept as {printable(str(kept))}", flush=True)


def train(run: Planned, folder: Path, threads: int, lock: IO[str]) -> Record | str:
    """Train in the folder, from its last checkpoint if there is one, to the end.

    Returns:
        What it came to; or why that is no result, and the run is to be made again.
    """
    if (folder / SUMMARY).exists() and not ran_out_of_time(folder):  # it ended, but was not recorded
        return collect(run, folder)
    resume = ["ckpt_path=last"] if (folder / LAST).exists() else []
    if not resume and folder.exists():
        shutil.rmtree(folder)  # killed before its first checkpoint
    arguments = [*settings_of(run), f"run_dir='{folder}'", *resume]
    trainer = trainer_of(run)
    with taken(num_gpus(trainer), visible_gpus()) as gpus:
        if gpus or not of_one_process(trainer) or sys.platform != "linux":
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **gpus}
            command = [sys.executable, TRAIN, *arguments]
            ran = subprocess.run(command, env=environment, capture_output=True, text=True, close_fds=False, check=False)
            ended = Ended(ran.returncode, ran.stdout, ran.stderr)
        else:
            ended = warm_process(threads).train(arguments, [lock])
    if ended.returncode == 0 and ran_out_of_time(folder):
        return "out of time; start the study again and it goes on"
    if ended.returncode in (0, cli.DIVERGED):
        return collect(run, folder)
    # By a signal, or as one of several processes of which another was.
    if ended.returncode < 0 or ended.returncode > 128 or ended.returncode == PEER_LOST:
        return "killed; start the study again and it resumes"
    last = (ended.stderr.strip() or ended.stdout.strip() or f"exit code {ended.returncode}").splitlines()[-1]
    if ended.returncode == cli.USER_ERROR:  # of this machine, as too little memory, or of what was asked for
        return f"no result, {last.removeprefix('Error: ')}; start the study again and it is run again"
    return collect(run, folder, broken=last)


def ran_out_of_time(folder: Path) -> bool:
    """Return whether the run ended by trainer.max_time: its loss is that of fewer steps than were planned."""
    return read_status(folder).get("status") == TIMED_OUT


def trainer_of(run: Planned) -> DictConfig | None:
    """Return the trainer's settings; None where there is a mistake in the run's overrides, which train.py will say."""
    try:
        with composing_anew():
            trainer: DictConfig = compose_run(run.overrides).trainer
    except cli.MISTAKES:
        return None
    return trainer


def num_gpus(trainer: DictConfig | None) -> int:
    """Return on how many GPUs of this machine a run trains.

    Raises:
        ConfigError: more than there are.
    """
    return 0 if trainer is None else gpus_wanted(trainer, visible_gpus())


def of_one_process(trainer: DictConfig | None) -> bool:
    """Return whether a run on a CPU is one process."""
    return trainer is None or (trainer.devices in (1, "1", "auto") and trainer.get("num_nodes", 1) == 1)


def launches_elsewhere(overrides: Sequence[str]) -> bool:
    """Return whether the runs are other machines', whose GPUs this one knows nothing of."""
    return any(override.startswith("hydra/launcher=submitit") for override in overrides)


@cli.tool
def main(config: StudyConfig) -> None:
    overrides = list(config.overrides)
    plan = planned(overrides)
    if not launches_elsewhere(overrides):  # on what may have other packages and devices
        check_runs([run for run in known_runs(plan) if not is_done(plan.record_of(run), run)])
    for folder in (plan.results, plan.runs):  # whichever seeds are asked for now: a report is to say what is missing
        plan.whole.save(folder / "study.yaml")
    for batch in rounds(plan):
        known = known_runs(plan)
        done = {run.name: is_done(plan.record_of(run), run) for run in known}
        todo = [run.name for run in batch if not done[run.name] or lacks_outcomes(plan, run)]
        print(f"{plan.study.name}, {plan.study.scale}: {sum(done.values())} of {len(known)} runs are done", flush=True)
        if todo:
            if not launches_elsewhere(overrides):
                num_gpus(trainer_of(next(run for run in batch if run.name == todo[0])))
            sys.argv[1:] = ["--multirun", *overrides, f"run={','.join(todo)}"]
            run_one()
    without = [run.name for run in known_runs(plan) if not is_done(plan.record_of(run), run)]
    if without:
        more = f" and {len(without) - NAMED} more" if len(without) > NAMED else ""
        raise UserError(
            f"{len(without)} {'run has' if len(without) == 1 else 'runs have'} no result: "
            f"{', '.join(without[:NAMED])}{more}; why is said above, and the study started again goes on with them"
        )


if __name__ == "__main__":
    cli.run(main)
