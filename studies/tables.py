"""A study's records as figures: means over seeds, what failed, what is missing, and how sure a difference is."""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from core.task import LOSS
from studies.grid import LEARNING_RATE, Planned, Point, Study
from studies.record import BLEMISHES, DIGITS, Record

CONFIDENCE = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Cell:
    """Says what is known of one point of the grid.

    Attributes:
        records: of its seeds, as far as there are any.
        planned: how many there are to be.
        outcome: what of them: the final validation loss, or one of Record.figures.
    """

    records: tuple[Record, ...]
    planned: int
    outcome: str = LOSS

    @property
    def values(self) -> dict[int, float]:
        """{seed: the outcome} of the runs that have not failed."""
        found = {record.seed: record.outcome(self.outcome) for record in self.records if not record.failed}
        return {seed: value for seed, value in found.items() if value is not None}

    @property
    def mean(self) -> float | None:
        """Return their mean; None where a run failed or none is there: a mean of survivors hides it."""
        return statistics.fmean(self.values.values()) if self.values and not self.failed else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds (n - 1); None of fewer than two."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 and not self.failed else None

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.records if record.failed]

    @property
    def missing(self) -> int:
        return self.planned - len(self.records)

    def __str__(self) -> str:
        """Return `1.852 ± 0.004 (3)`, with what failed and what is missing beside it."""
        parts = []
        if self.mean is not None:
            spread = "" if self.deviation is None else f" ± {self.deviation:.3f}"
            blemished = [record.status for record in self.records if record.status in BLEMISHES]
            beside = f", {_counted(blemished)}" if blemished else ""
            parts.append(f"{self.mean:.3f}{spread} ({len(self.values)}{beside})")
        if self.failed:
            rest = f", {len(self.values)} not" if self.values else ""
            parts.append(f"failed: {_counted([record.status for record in self.failed])}{rest}")
        if self.missing:
            parts.append(f"{self.missing} missing")
        return "; ".join(parts)


def _counted(kinds: Sequence[str]) -> str:
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


@dataclass(frozen=True)
class Grids:
    """Holds a study's records by point, each grid with every point, also those without a record.

    Attributes:
        selection: with the seeds that select the learning rate.
        judged: with those that judge; without seeds of its own for selection, the same grid.
    """

    selection: dict[Point, Cell]
    judged: dict[Point, Cell]

    @property
    def every(self) -> dict[Point, Cell]:
        """Both together."""
        if self.judged is self.selection:
            return self.selection
        return {point: _joined(cell, self.judged[point]) for point, cell in self.selection.items()}

    @property
    def alike(self) -> dict[Point, Cell]:
        """Both together; of a point that is judged by other runs than select it, as longer ones, those that judge."""
        return {point: self._alike(point, cell) for point, cell in self.every.items()}

    def _alike(self, point: Point, both: Cell) -> Cell:
        kinds = {tuple(record.overrides) for record in both.records}
        return both if len(kinds) < 2 else self.judged[point]


def of_outcome(grid: Mapping[Point, Cell], outcome: str) -> dict[Point, Cell]:
    """Return the same points, of which another outcome is looked at."""
    return {point: replace(cell, outcome=outcome) for point, cell in grid.items()}


def _joined(one: Cell, other: Cell) -> Cell:
    return Cell((*one.records, *other.records), one.planned + other.planned)


def grids(study: Study, records: Iterable[Record]) -> Grids:
    """Return the records by point. Those of other points and seeds are left out."""
    records = list(records)
    selection = cells(study, records, study.select_seeds or study.seeds)
    if not study.select_seeds:
        return Grids(selection, selection)
    chosen = {point for point in selected(study, selection).values() if study.is_judged(point)}
    judged = cells(study, records, study.seeds)
    return Grids(selection, {point: cell if point in chosen else Cell((), 0) for point, cell in judged.items()})


def cells(study: Study, records: Iterable[Record], seeds: Sequence[int]) -> dict[Point, Cell]:
    """Return every point of the grid with the records of some seeds."""
    found: dict[Point, list[Record]] = {point: [] for point in itertools.product(*study.axes.values())}
    for record in sorted(records, key=lambda record: record.seed):
        point = tuple(record.point.get(axis, "") for axis in study.axes)
        if point in found and record.seed in seeds:
            found[point].append(record)
    return {point: Cell(tuple(these), len(seeds)) for point, these in found.items()}


def selected(study: Study, grid: Mapping[Point, Cell]) -> dict[Point, Point]:
    """Return what `tuned` does, but of points only all of whose learning rates have ended with all seeds."""
    at = list(study.axes).index(LEARNING_RATE)
    waiting = {point[:at] + point[at + 1 :] for point, cell in grid.items() if cell.missing}
    return {others: point for others, point in tuned(study, grid).items() if others not in waiting}


def judging_runs(study: Study, records: Iterable[Record]) -> list[Planned]:
    """Return the runs that follow on a selection, as far as it has ended; none in a study without one."""
    if not study.select_seeds:
        return []
    return study.runs_at(selected(study, cells(study, records, study.select_seeds)).values())


def tuned(study: Study, grid: Mapping[Point, Cell]) -> dict[Point, Point]:
    """Return the point of the best learning rate, of those where no run failed, for each point of the other axes."""
    at = list(study.axes).index(LEARNING_RATE)
    best: dict[Point, Point] = {}
    for point, cell in grid.items():
        others = point[:at] + point[at + 1 :]
        if cell.mean is None:
            continue
        leader = grid[best[others]].mean if others in best else None
        if leader is None or cell.mean < leader:
            best[others] = point
    return best


class Comparison(NamedTuple):
    """A point against the baseline's.

    Attributes:
        difference: mean over the shared seeds of the cells' outcome less the baseline's.
        interval: of 95 %, by Student's t over them; None with fewer than two, or where all differences are equal to
            what a record holds of a loss: how far they scatter is then not known.
        p: two-sided, of the paired t-test over them; None likewise.
        detectable: the true difference that such a test would find in four cases of five at p < 0.05, with the
            deviation that was seen; None likewise.
        seeds: how many they share.
    """

    difference: float
    interval: tuple[float, float] | None
    p: float | None
    detectable: float | None
    seeds: int


def compare(ours: Cell, baseline: Cell) -> Comparison | None:
    """Compare two points by seed, which draws weights and data alike. None: a seed failed, or they share none."""
    mine, theirs = ours.values, baseline.values
    shared = [seed for seed in mine if seed in theirs]
    if not shared or ours.failed or baseline.failed:
        return None
    differences = [mine[seed] - theirs[seed] for seed in shared]
    mean, number = statistics.fmean(differences), len(shared)
    rounding = max(_rounding(cell[seed]) for cell in (mine, theirs) for seed in shared)
    if number < 2 or statistics.stdev(differences) <= rounding:
        return Comparison(mean, None, None, None, number)
    test = stats.ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    power = TTestPower().solve_power(nobs=number, alpha=1 - CONFIDENCE, power=POWER)
    detectable = float(power) * statistics.stdev(differences)
    return Comparison(mean, (float(interval.low), float(interval.high)), float(test.pvalue), detectable, number)


def _rounding(value: float) -> float:
    """Return the standard deviation of the difference of two such values by their rounding to DIGITS digits."""
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - DIGITS + 1) if value else 0.0
    return float(unit / math.sqrt(6))


def corrected(comparisons: Sequence[Comparison | None]) -> list[float | None]:
    """Return the p of each by Holm's step-down over all: the chance that any is found by luck alone.

    One without a p, as of a scheme that failed, was to be tested all the same and counts among them; its own is None.
    """
    known = [1.0 if found is None or found.p is None else found.p for found in comparisons]
    adjusted = multipletests(known, method="holm")[1] if known else []
    return [
        None if found is None or found.p is None else float(p) for found, p in zip(comparisons, adjusted, strict=True)
    ]
