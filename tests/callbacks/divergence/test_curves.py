"""The detectors at their default thresholds, against 40 recorded runs: tests/callbacks/divergence/curves/record.py."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from callbacks.divergence.divergence import Divergence
from tests.callbacks.divergence.curves.record import DIVERGING, HEALTHY

HERE = Path(__file__).parent / "curves"
HEALTHY_CURVES, DIVERGING_CURVES = (json.loads((HERE / f"{n}.json").read_text()) for n in ("healthy", "diverging"))


def alarms(curve: dict[str, Any]) -> dict[int, list[str]]:
    """{step, counted from 1: kinds}."""
    detectors = Divergence(run_dir="nowhere").detectors
    pairs = zip(curve["loss"], curve["grad_norm"], strict=True)
    found = {step: detectors.update(*pair) for step, pair in enumerate(pairs, start=1)}
    return {step: [alarm.kind for alarm in kinds] for step, kinds in found.items() if kinds}


def onset(losses: list[float]) -> int:
    """In hindsight: the first step whose loss is half as high again as the median of the 32 before it."""
    for step in range(10, len(losses)):
        before = statistics.median(losses[max(0, step - 32) : step])
        if not math.isfinite(losses[step]) or losses[step] > 1.5 * before:
            return step + 1
    raise AssertionError("it does not diverge")


def test_the_curves_are_those_of_the_recording_script() -> None:
    assert list(HEALTHY_CURVES) == list(HEALTHY)
    assert list(DIVERGING_CURVES) == list(DIVERGING)
    assert len(HEALTHY) == len(DIVERGING) == 20
    assert {name: curve["fault"] for name, curve in DIVERGING_CURVES.items()} == {
        n: at for n, (at, _) in DIVERGING.items()
    }


@pytest.mark.parametrize("name", HEALTHY_CURVES)
def test_a_healthy_run_raises_no_alarm(name: str) -> None:
    losses = HEALTHY_CURVES[name]["loss"]
    assert statistics.median(losses[-20:]) < losses[0] - 1, "healthy: it has learnt"
    assert alarms(HEALTHY_CURVES[name]) == {}


@pytest.mark.parametrize("name", DIVERGING_CURVES)
def test_a_diverging_run_raises_one_within_5_steps(name: str) -> None:
    curve = DIVERGING_CURVES[name]
    start = curve["fault"] or onset(curve["loss"])
    steps = list(alarms(curve))
    assert any(start <= step <= start + 5 for step in steps), steps
    if curve["fault"]:
        assert steps[0] >= start, "not before it was struck"
