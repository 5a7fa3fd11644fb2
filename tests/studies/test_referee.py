"""A referee's recomputation: the comparisons of every committed report, from the records' JSON and by other code.

Nothing of the package is used. Student's distribution is integrated, and Holm's correction written out.
"""

import itertools
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

RESULTS = Path(__file__).parents[2] / "results/studies"
REPORTS = sorted(path.parent for path in RESULTS.glob("*/*/report.md") if "\n## Against " in path.read_text())
FAILED = {"diverged", "collapsed", "broken"}
NODES, WEIGHTS = np.polynomial.legendre.leggauss(100)
Cell = dict[int, float | None]
"""Final validation loss by seed, or the figure that runs are compared by; None: training failed."""


def upper_tail(t: float, degrees: int) -> float:
    """Return the chance of a Student's t above |t|: its density, integrated by Gauss' rule over arctan(t / sqrt n)."""
    low, high = math.atan(abs(t) / math.sqrt(degrees)), math.pi / 2
    x = (high - low) / 2 * NODES + (high + low) / 2
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
    return float(constant * (high - low) / 2 * np.sum(WEIGHTS * np.cos(x) ** (degrees - 1)))


@cache
def quantile(degrees: int) -> float:
    """Return the t beyond which 2.5 % lie, by halving."""
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if upper_tail(middle, degrees) > 0.025 else (low, middle)
    return low


def holm(chances: list[float]) -> list[float]:
    adjusted, largest = [0.0] * len(chances), 0.0
    for rank, index in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        largest = max(largest, min(1.0, (len(chances) - rank) * chances[index]))
        adjusted[index] = largest
    return adjusted


def outcome(record: dict[str, Any]) -> float:
    """Return a record's loss, or the figure that it says it is to be compared by: accuracy, of images."""
    name = record.get("main", "loss")
    return float(record["val_loss"] if name == "loss" else record["figures"][name])


def more_is_better(folder: Path) -> bool:
    (name,) = {json.loads(path.read_text()).get("main", "loss") for path in folder.glob("*.json")}
    assert name in ("loss", "accuracy")
    return bool(name == "accuracy")


def grid(folder: Path, study: dict[str, Any], seeds: Iterable[int]) -> dict[tuple[str, ...], Cell]:
    found: dict[tuple[str, ...], Cell] = defaultdict(dict)
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        if record["seed"] in seeds:
            point = tuple(record["point"][axis] for axis in study["axes"])
            found[point][record["seed"]] = None if record["status"] in FAILED else outcome(record)
    return found


def mean(cell: Cell) -> float | None:
    losses = list(cell.values())
    return None if not losses or None in losses else statistics.fmean(x for x in losses if x is not None)


def compared(folder: Path) -> dict[tuple[str, ...], list[float] | None]:
    """Return, by the labels of a row, the differences to the baseline by seed; None: one of the two failed."""
    study = yaml.safe_load((folder / "study.yaml").read_text())
    axes, baseline = list(study["axes"]), study["baseline"]
    judged = grid(folder, study, study["seeds"])
    chosen = {point: point for point in judged}
    if "optim.lr" in axes:
        at = axes.index("optim.lr")
        chosen = {}
        selecting = grid(folder, study, study.get("select_seeds") or study["seeds"])
        for point in itertools.product(*study["axes"].values()):
            others, value = point[:at] + point[at + 1 :], mean(selecting[point])
            best = mean(selecting[chosen[others]]) if others in chosen else None
            if value is not None and (best is None or value < best):
                chosen[others] = point
    rows: dict[tuple[str, ...], list[float] | None] = {}
    for labels, point in chosen.items():
        if labels[0] == baseline:
            continue
        ours, theirs = judged[point], judged[chosen.get((baseline, *labels[1:]), ())]
        shared = [seed for seed in ours if seed in theirs]
        whole = mean(ours) is not None and mean(theirs) is not None and shared
        rows[labels] = [ours[seed] - theirs[seed] for seed in shared] if whole else None  # type: ignore[operator]
    return rows


def table(folder: Path) -> dict[tuple[str, ...], list[str]]:
    """Return the report's rows by their labels."""
    text = (folder / "report.md").read_text().split("\n## Against ")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    labels = lines[0].index("difference")
    return {tuple(line[:labels]): line[labels:] for line in lines[1:]}


@pytest.mark.parametrize("folder", REPORTS, ids=lambda folder: folder.parent.name)
def test_the_comparisons_are_what_the_records_say(folder: Path) -> None:
    rows, said = compared(folder), table(folder)
    known = {labels: found for labels, found in rows.items() if found is not None}
    assert set(said) >= set(known)
    assert all(said[labels][0] == "-" for labels in said if labels not in known)
    family = yaml.safe_load((folder / "study.yaml").read_text()).get("family") or [labels[0] for labels in rows]
    figures: dict[tuple[str, ...], tuple[float, float, float]] = {}
    for labels, found in known.items():
        # Records have five digits, of losses of 1 to 10 or of accuracies below: equal to those, as where three seeds
        # tell one image more apart each, differences say nothing of how far they scatter.
        if statistics.stdev(found) <= (1e-5 if more_is_better(folder) else 1e-4) / math.sqrt(6):
            assert said[labels][:3] == [f"{statistics.fmean(found):+.3f} ({len(found)})", "-", "-"], labels
            continue
        error = statistics.stdev(found) / math.sqrt(len(found))
        middle, reach = statistics.fmean(found), quantile(len(found) - 1) * error
        figures[labels] = middle - reach, middle + reach, 2 * upper_tail(middle / error, len(found) - 1)
        difference, interval, p = said[labels][:3]
        assert difference == f"{middle:+.3f} ({len(found)})", labels
        for ours, theirs in zip(figures[labels][:2], re.findall(r"[+-][\d.]+", interval), strict=True):
            assert ours == pytest.approx(float(theirs), abs=0.00051), labels
        assert figures[labels][2] == pytest.approx(float(p), abs=0.00051), labels
    claims = [labels for labels in rows if labels[0] in family]
    chances = [figures[labels][2] if labels in figures else 1.0 for labels in claims]
    better = "+" if more_is_better(folder) else "-"
    for labels, adjusted in zip(claims, holm(chances), strict=True):
        if labels not in figures:
            continue
        assert adjusted == pytest.approx(float(said[labels][3]), abs=0.00051), labels
        verdict = ("better" if said[labels][0].startswith(better) else "worse") if adjusted < 0.05 else "not told apart"
        assert said[labels][5] == verdict, labels


def test_there_are_reports_to_recompute() -> None:
    assert {folder.parent.name for folder in REPORTS} >= {"placement_by_init", "learning_rate", "depth", "muon"}


def test_the_referees_distribution_is_the_one_in_the_tables() -> None:
    assert [quantile(degrees) for degrees in (1, 2, 3, 10)] == pytest.approx(
        [12.7062, 4.30265, 3.18245, 2.22814], rel=1e-5
    )
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
