"""Say what a study plans: its runs, those that its selection has led to, and where records and folders are.

Imports neither torch nor Lightning, so that `python -m studies.status` answers at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig

from core.dataclass_cli import STUDY_OVERRIDES
from core.errors import ConfigError, require
from core.overrides import CONFIGS
from core.run_folder import LAST, OVERRIDES
from core.status import SUMMARY
from core.untrusted import Untrusted, read_yaml
from studies.grid import LEARNING_RATE, Planned, Study, read
from studies.record import Record
from studies.tables import grids, judging_runs, selected


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
    paths = ((run, folder / f"{run.name}.json") for run in study.runs())
    records = [Record.load(path) for run, path in paths if is_done(path, run)]
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


def was_begun_as(run: Planned, folder: Path) -> bool:
    """Return whether what the folder holds is a run of these overrides and this seed; an empty one is of any."""
    if not (folder / OVERRIDES).exists():
        return not (folder / LAST).exists() and not (folder / SUMMARY).exists()
    try:
        saved = read_yaml(folder / OVERRIDES)
    except Untrusted:
        return False
    where = ("run_dir=", "ckpt_path=")
    return isinstance(saved, list) and [one for one in saved if not str(one).startswith(where)] == settings_of(run)


def settings_of(run: Planned) -> list[str]:
    """Return the overrides that a run is begun with, but for where it lies."""
    return [*run.overrides, f"seed={run.seed}", "blocks=all"]  # records are of all blocks


def lock_of(folder: Path) -> Path:
    """Return the lock's place beside the folder, which may have to be made anew."""
    return folder.with_name(f".{folder.name}.lock")
