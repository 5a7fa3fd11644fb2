"""A study's records as figures: means over seeds, what failed, what is missing, and how sure a difference is."""

import itertools
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from scipy import stats

from studies.grid import Study
from studies.record import Record

LEARNING_RATE = "optim.lr"
Point = tuple[str, ...]
"""Labels on a study's axes, in their order."""


@dataclass(frozen=True)
class Cell:
    """Says what is known of one point of the grid.

    Attributes:
        records: of its seeds, as far as there are any.
        planned: how many there are to be.
    """

    records: tuple[Record, ...]
    planned: int

    @property
    def losses(self) -> dict[int, float]:
        """{seed: final validation loss} of the finished runs; a failed run has none."""
        return {r.seed: r.val_loss for r in self.records if r.finished and r.val_loss is not None}

    @property
    def mean(self) -> float | None:
        """Return the finished runs' mean; None where a run failed or none is there: a mean of survivors hides it."""
        return statistics.fmean(self.losses.values()) if self.losses and not self.failed else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds (n - 1); None of fewer than two."""
        return statistics.stdev(self.losses.values()) if len(self.losses) > 1 and not self.failed else None

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.records if not record.finished]

    @property
    def missing(self) -> int:
        return self.planned - len(self.records)

    def __str__(self) -> str:
        """Return `1.852 ± 0.004 (3)`, with what failed and what is missing beside it."""
        parts = []
        if self.mean is not None:
            spread = "" if self.deviation is None else f" ± {self.deviation:.3f}"
            parts.append(f"{self.mean:.3f}{spread} ({len(self.losses)})")
        if self.failed:
            kinds = [record.status for record in self.failed]
            counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
            rest = f", {len(self.losses)} finished" if self.losses else ""
            parts.append(f"failed: {counts}{rest}")
        if self.missing:
            parts.append(f"{self.missing} missing")
        return "; ".join(parts)


def cells(study: Study, records: Iterable[Record]) -> dict[Point, Cell]:
    """Return every point of the grid, also those without a record. Records of other points are left out."""
    found: dict[Point, list[Record]] = {point: [] for point in itertools.product(*study.axes.values())}
    for record in sorted(records, key=lambda record: record.seed):
        point = tuple(record.point.get(axis, "") for axis in study.axes)
        if point in found and record.seed in study.seeds:
            found[point].append(record)
    return {point: Cell(tuple(these), len(study.seeds)) for point, these in found.items()}


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
        difference: mean over the shared seeds of the final validation loss less the baseline's.
        p: two-sided, of the paired t-test over them; None with fewer than two, or where all differences are equal.
        seeds: how many they share.
    """

    difference: float
    p: float | None
    seeds: int


def compare(ours: Cell, baseline: Cell) -> Comparison | None:
    """Compare two points by seed, which draws weights and data alike. None: a seed failed, or they share none."""
    mine, theirs = ours.losses, baseline.losses
    shared = [seed for seed in mine if seed in theirs]
    if not shared or ours.failed or baseline.failed:
        return None
    differences = [mine[seed] - theirs[seed] for seed in shared]
    p = None
    if len(shared) > 1 and len(set(differences)) > 1:
        p = float(stats.ttest_rel([mine[seed] for seed in shared], [theirs[seed] for seed in shared]).pvalue)
    return Comparison(statistics.fmean(differences), p, len(shared))
