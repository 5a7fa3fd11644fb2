"""Run a study: every run of its grid that has no record yet, each in a process of its own.

    python -m studies.run study=placement_by_init                          as many at once as there are cores, or GPUs
    python -m studies.run study=learning_rate hydra.launcher.n_jobs=2 'seeds=[0]'
    python -m studies.run study=depth scale=gpu hydra/launcher=submitit_slurm hydra.launcher.partition=NAME

Hydra's launchers do the running; on a machine with GPUs each run has as many as it trains on, and waits for them. A run
that was killed resumes from its last checkpoint; one that had not the memory is no result either, and is run again; one
that failed is recorded as failed, and the rest goes on. `python -m studies.status` says how far it is.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

from core import cli
from core.dataclass_cli import STUDY_OVERRIDES
from core.errors import ConfigError, one_line, require, suggest
from core.interruption import PEER_LOST
from core.memory import LACK
from core.overrides import CONFIGS
from core.printable import printable
from core.run_folder import LAST
from core.saved_config import texts
from lightning_modules.composing import compose_run
from studies.checking import check_runs
from studies.composing import composing_anew
from studies.decay import LARGEST_BUILT, measure
from studies.devices import gpus_wanted, taken, visible_gpus
from studies.grid import LEARNING_RATE, Planned, Study, read
from studies.record import BROKEN, Record, collect, storable
from studies.tables import grids, judging_runs, selected

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class StudyConfig:
    """Holds the fields that `python -m studies.run` and `python -m studies.status` take.

    Attributes:
        overrides: study=NAME, and what else configs/study.yaml has: scale, seeds, threads, the folders, hydra/launcher.
    """

    overrides: tuple[str, ...] = field(default=(), metadata=STUDY_OVERRIDES)


class Plan(NamedTuple):
    """Holds the runs that the overrides ask for.

    Attributes:
        study: with the seeds that are asked for.
        whole: with all of its own.
        results: the folder of its records.
        runs: that of its runs.
        outcomes: scalars that are measured of each finished model.
    """

    study: Study
    whole: Study
    results: Path
    runs: Path
    outcomes: tuple[str, ...] = ()

    def record_of(self, run: Planned) -> Path:
        """Return the path of a run's record."""
        return self.results / f"{run.name}.json"


def plan_of(config: DictConfig) -> Plan:
    """Return the plan of a composed configs/study.yaml."""
    name = HydraConfig.get().runtime.choices.get("study")
    require(isinstance(name, str) and isinstance(config.study, DictConfig), "study", name, "the name of one study")
    assert isinstance(name, str)
    for kind in ("results_dir", "runs_dir"):
        require(isinstance(config[kind], str) and config[kind] != "", kind, config[kind], "the path of a folder")
    threads = config.threads
    require(type(threads) is int and 1 <= threads <= 1024, "threads", threads, "an integer from 1 to 1024")
    outcomes = config.outcomes
    is_list = isinstance(outcomes, ListConfig) and all(isinstance(name, str) for name in outcomes)
    require(is_list, "outcomes", outcomes, "a list of names, as [layer_drop,late_drop]")
    if outcomes:
        from tools.examination.examine import known_outcomes

        known_outcomes(outcomes)
    rates_of = partial(selected_rates, Path(config.results_dir), config.scale)
    study, whole = (read(name, config.study, config.scale, seeds, rates_of) for seeds in (config.seeds, None))
    results, runs = (Path(folder) / name / config.scale for folder in (config.results_dir, config.runs_dir))
    return Plan(study, whole, results, runs, tuple(outcomes))


def selected_rates(results: Path, scale: str, name: str) -> list[tuple[dict[str, str], float]]:
    """Return the learning rates that another study has selected: ({axis: label}, rate).

    Args:
        results: the folder of all studies' records.
        scale: of both studies.
        name: of the other.

    Raises:
        ConfigError: it has not been run at this scale, or some of its grid is still to be run.
    """
    folder = results / name / scale
    valid = f"a study that has been run: python -m studies.run study={name} scale={scale}"
    if not (folder / "study.yaml").is_file():
        raise ConfigError("study.rates_from", name, valid)
    study = Study.load(folder / "study.yaml")
    if LEARNING_RATE not in study.axes:
        raise ConfigError("study.rates_from", name, f"a study with an axis {LEARNING_RATE}")
    records = [Record.load(path) for run in study.runs() if (path := folder / f"{run.name}.json").is_file()]
    grid = grids(study, records).selection
    missing = sum(cell.missing for cell in grid.values())
    if missing:
        raise ConfigError("study.rates_from", name, f"{valid}; {missing} runs of its grid have no record yet")
    found = []
    for point in selected(study, grid).values():
        labels = dict(zip(study.axes, point, strict=True))
        found.append((labels, float(labels.pop(LEARNING_RATE))))
    return found


def planned(overrides: list[str]) -> Plan:
    """Return the plan of the command line's overrides."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("study", overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        require(config.run is None, "run", config.run, "null: a study runs all that have no record yet")
        return plan_of(config)


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
    with held(folder):
        if not is_done(path, run):
            record = train(run, folder, config.threads)
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
        found = outcomes_of(folder, outcomes, allow=named(record))
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


def known_runs(plan: Plan) -> list[Planned]:
    """Return the runs of the grid, and those that its selection has led to so far."""
    grid = plan.study.runs()
    if not plan.study.select_seeds:
        return grid
    ended = [run for run in grid if is_done(plan.record_of(run), run)]
    return [*grid, *judging_runs(plan.study, [Record.load(plan.record_of(run)) for run in ended])]


def rounds(plan: Plan) -> Iterator[list[Planned]]:
    """Yield what to train, in this order: the grid of what is to be judged, the runs that judge it, the other runs.

    A study that is broken off has then compared what it was made to compare.
    """
    grid = plan.study.runs()
    rest = [run for run in grid if not plan.study.is_judged(tuple(run.point.values()))]
    later = {run.name for run in rest}
    yield [run for run in grid if run.name not in later]
    if plan.study.select_seeds:  # asked for once the first round has its records
        of_grid = {run.name for run in grid}
        yield [run for run in known_runs(plan) if run.name not in of_grid]
    if rest:
        yield rest


def is_done(path: Path, run: Planned) -> bool:
    """Return whether there is a record of just this run."""
    return path.exists() and Record.load(path).overrides == list(run.overrides)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Wait until nobody else runs in the folder. The training process inherits the lock: it outlives a killed study."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(lock_of(folder), "w") as lock:
        os.set_inheritable(lock.fileno(), True)
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def lock_of(folder: Path) -> Path:
    """Return the lock's place beside the folder, which may have to be made anew."""
    return folder.with_name(f".{folder.name}.lock")


def train(run: Planned, folder: Path, threads: int) -> Record | str:
    """Train in the folder, from its last checkpoint if there is one, to the end.

    Returns:
        What it came to; or why that is no result, and the run is to be made again.
    """
    if (folder / "summary.json").exists():  # it ended, but was not recorded
        return collect(run, folder)
    resume = ["ckpt_path=last"] if (folder / LAST).exists() else []
    if not resume and folder.exists():
        shutil.rmtree(folder)  # killed before its first checkpoint
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *run.overrides,
        f"seed={run.seed}",
        "blocks=all",  # which records are of
        f"run_dir='{folder}'",
        *resume,
    ]
    with taken(num_gpus(run), visible_gpus()) as gpus:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **gpus}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, close_fds=False, check=False)
    if ended.returncode == 0:
        return collect(run, folder)
    # By a signal, or as one of several processes of which another was.
    if ended.returncode < 0 or ended.returncode > 128 or ended.returncode == PEER_LOST:
        return "killed; start the study again and it resumes"
    last = (ended.stderr.strip() or ended.stdout.strip() or f"exit code {ended.returncode}").splitlines()[-1]
    if LACK in last:
        return f"no result, {last.removeprefix('Error: ')}; start the study again and it is run again"
    return collect(run, folder, broken=last)


def num_gpus(run: Planned) -> int:
    """Return on how many GPUs of this machine a run trains.

    Raises:
        ConfigError: more than there are.
    """
    visible = visible_gpus()
    try:
        with composing_anew():
            trainer = compose_run(run.overrides).trainer
    except cli.MISTAKES:  # which train.py will say
        return 0
    return gpus_wanted(trainer, visible)


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
                num_gpus(next(run for run in batch if run.name == todo[0]))
            sys.argv[1:] = ["--multirun", *overrides, f"run={','.join(todo)}"]
            run_one()


if __name__ == "__main__":
    cli.run(main)
