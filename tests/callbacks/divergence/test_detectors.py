"""The detectors against tables of made-up series; test_curves.py holds them against real ones."""

import itertools
import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from callbacks.divergence.detectors import (
    CLIMB,
    GRADIENT_SPIKE,
    LOSS_SPIKE,
    NONFINITE_GRADIENT,
    NONFINITE_LOSS,
    PLATEAU,
    Alarm,
    Detectors,
    Usual,
)

Series = Callable[[int], float]
NAN, INF = math.nan, math.inf


def noise(step: int, size: float) -> float:
    return random.Random(step).gauss(0, size)


def falling(step: int) -> float:
    """A loss as runs have it: 5.5 at first, towards 2.2, with the noise of small batches."""
    return 2.2 + 3.3 * math.exp(-step / 60) + noise(step, 0.1)


def steady(step: int) -> float:
    return 2.5 + noise(step, 0.1)


def watch(loss: Series, norm: Series = lambda step: 1.0, steps: int = 300) -> dict[str, list[int]]:
    """{kind of alarm: the steps, counted from 1}."""
    detectors, found = Detectors(7.0, 8.0, 6.0), {}
    for step in range(1, steps + 1):
        for alarm in detectors.update(loss(step), norm(step)):
            found.setdefault(alarm.kind, []).append(step)
    return found


def struck(at: int, to: float, series: Series = steady, last: int | None = None) -> Series:
    """The series, but `to` from step `at` to step `last` (default: that step only)."""
    return lambda step: to if at <= step <= (last or at) else series(step)


def drifting(step: int) -> float:
    return steady(step) + max(0, step - 100) * 0.01


QUIET: dict[str, tuple[Series, Series]] = {
    "a falling loss": (falling, lambda step: 1.0),
    "a steady loss": (steady, lambda step: 1.0),
    "a loss that never changes": (lambda step: 3.0, lambda step: 1.0),
    "a loss of nothing": (lambda step: 0.0, lambda step: 0.0),
    "much noise": (lambda step: 3 + noise(step, 0.5), lambda step: math.exp(noise(step, 0.5))),
    "noise that grows": (lambda step: 3 + noise(step, 0.1 + step / 1000), lambda step: 1.0),
    "first steps that go up": (
        lambda step: 5.5 + 0.3 * min(step, 10) if step < 15 else falling(step),
        lambda step: 1.0,
    ),
    "first gradients that are huge": (falling, lambda step: 1000 / step),
    "a cut of the learning rate": (lambda step: falling(step) - (0.3 if step > 150 else 0), lambda step: 1.0),
    "a learning rate warmed up again": (lambda step: steady(step) + (0.1 if step > 150 else 0), lambda step: 2.0),
    "gradients that grow thirtyfold in 300 steps": (falling, lambda step: 30 ** (step / 300)),
    "a spike of the gradient that clipping is for": (falling, struck(100, 25.0, lambda step: 1.0)),
}


@pytest.mark.parametrize("name", QUIET)
def test_no_alarm(name: str) -> None:
    assert watch(*QUIET[name]) == {}


LOUD: list[tuple[str, Series, Series, str, int, int]] = [  # alarm of that kind within steps first to last
    ("a spike", struck(100, 6.0), lambda step: 1.0, LOSS_SPIKE, 100, 100),
    ("a small spike of a quiet loss", struck(100, 3.2, lambda step: 2.5), lambda step: 1.0, LOSS_SPIKE, 100, 100),
    ("a spike of a falling loss", struck(30, 6.0, falling), lambda step: 1.0, LOSS_SPIKE, 30, 30),
    ("a spike in the first steps", struck(12, 60.0, falling), lambda step: 1.0, LOSS_SPIKE, 12, 12),
    ("a loss that is no number", struck(100, NAN), lambda step: 1.0, NONFINITE_LOSS, 100, 100),
    ("an infinite loss in the first step", struck(1, INF), lambda step: 1.0, NONFINITE_LOSS, 1, 1),
    ("a gradient that is no number", steady, struck(100, NAN, lambda step: 1.0), NONFINITE_GRADIENT, 100, 100),
    ("a gradient a hundred times as large", steady, struck(100, 100.0, lambda step: 1.0), GRADIENT_SPIKE, 100, 100),
    ("a drift of 0.01 a step", drifting, lambda step: 1.0, CLIMB, 120, 160),
    ("a spike that stays", struck(100, 5.5, steady, 300), lambda step: 1.0, PLATEAU, 150, 155),
]


@pytest.mark.parametrize(
    ("loss", "norm", "kind", "first", "last"), [case[1:] for case in LOUD], ids=[c[0] for c in LOUD]
)
def test_alarm(loss: Series, norm: Series, kind: str, first: int, last: int) -> None:
    found = watch(loss, norm)
    assert first <= found[kind][0] <= last


def test_a_spike_is_no_other_kind_of_alarm_and_leaves_no_echo() -> None:
    assert watch(struck(100, 6.0)) == {LOSS_SPIKE: [100]}
    assert watch(struck(100, NAN, steady, 104)) == {NONFINITE_LOSS: [100, 101, 102, 103, 104]}


def test_a_plateau_is_named_once_and_is_the_usual_from_then_on() -> None:
    found = watch(struck(100, 5.5, lambda step: steady(step) + (0 if step < 100 else 3), 99), steps=600)
    assert len(found[PLATEAU]) == 1
    assert CLIMB not in found
    assert max(found[LOSS_SPIKE]) < 110, "a level of half the window is usual"


def test_a_drift_is_named_again_as_it_goes_on() -> None:
    steps = watch(drifting, steps=400)[CLIMB]
    assert 3 <= len(steps) <= 20


def test_a_recovered_spike_is_no_plateau() -> None:
    assert PLATEAU not in watch(struck(100, 5.5, steady, 130))


def test_the_figures_of_a_spike() -> None:
    """Level and spread written out again."""
    values = [2.0, 2.4, 2.1, 2.6, 2.2, 2.3, 2.5, 2.0, 2.2, 2.4, 2.1]
    detectors = Detectors(7.0, 8.0, 6.0)
    for value in values:
        assert detectors.update(value, 1.0) == []
    (alarm,) = detectors.update(9.0, 1.0)
    moves = sorted(abs(b - a) for a, b in itertools.pairwise(values))
    spread = 1.4826 / math.sqrt(2) * (moves[4] + moves[5]) / 2
    assert alarm == Alarm(LOSS_SPIKE, 9.0, 2.2, pytest.approx((9.0 - 2.2) / spread))
    assert str(alarm).startswith("loss spike 9 (usual 2.2, z ")


def test_the_spread_is_that_of_the_noise_whatever_the_slope() -> None:
    for slope in (0.0, -0.05):
        usual = Usual(floor=0.0, level_window=16)
        usual.values.extend(slope * step + noise(step, 0.2) for step in range(32))
        assert usual.spread == pytest.approx(0.2, rel=0.35)


def test_a_gradient_spike_is_told_in_norms() -> None:
    detectors = Detectors(7.0, 8.0, 6.0)
    for _ in range(20):
        detectors.update(2.5, 0.5)
    (alarm,) = detectors.update(2.5, 500.0)
    assert (alarm.value, alarm.expected) == (pytest.approx(500.0), pytest.approx(0.5))
    assert alarm.score == pytest.approx(math.log(1000) / 0.5), "the floor of the spread, as norms did not move"


@pytest.mark.parametrize("loss", [drifting, struck(100, 5.5, steady, 300), struck(140, NAN)])
@pytest.mark.parametrize("stop", [5, 99, 104, 130])
def test_a_resumed_detector_says_what_the_uninterrupted_one_says(loss: Series, stop: int) -> None:
    whole, first, second = (Detectors(7.0, 8.0, 6.0) for _ in range(3))
    expected: list[Any] = [whole.update(loss(step), 1.0) for step in range(1, 300)]
    for step in range(1, stop):
        first.update(loss(step), 1.0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert str([second.update(loss(step), 1.0) for step in range(stop, 300)]) == str(expected[stop - 1 :])
