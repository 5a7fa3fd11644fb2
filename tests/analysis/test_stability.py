"""Figures of stability against scipy's filters, and on curves whose spikes are known."""

import numpy as np
import pytest
from scipy.ndimage import median_filter
from scipy.stats import scoreatpercentile

from analysis.stability import (
    WINDOW,
    clipped_share,
    count_spikes,
    extreme_gradient_norm,
    learning_rate_sensitivity,
    spikes_per_10000,
)


def noisy_descent(steps: int, scatter: float, seed: int = 0) -> np.ndarray:
    return 2.0 + 3.0 * np.exp(-np.arange(steps) / 60) + scatter * np.random.default_rng(seed).normal(size=steps)


def test_a_smooth_descent_and_the_noise_of_small_batches_have_no_spikes() -> None:
    assert count_spikes(noisy_descent(2000, 0.0)) == 0
    assert count_spikes(noisy_descent(20_000, 0.08)) == 0, "8 % of these stand out by more than 0.1"
    assert count_spikes([2.0] * (WINDOW - 1)) is None


@pytest.mark.parametrize("at", [150, 1000, 1995])
def test_a_spike_is_found_wherever_it_is(at: int) -> None:
    losses = noisy_descent(2000, 0.01)
    losses[at : at + 3] += 0.5
    assert count_spikes(losses) == 3
    assert spikes_per_10000(losses) == pytest.approx(3 / 1900 * 10_000)
    losses[at] = np.nan
    assert count_spikes(losses) == 3


def test_little_that_is_far_above_the_noise_is_no_spike() -> None:
    losses = noisy_descent(2000, 0.001)
    losses[1000] += 0.09
    assert count_spikes(losses) == 0


def test_against_a_median_filter_over_more_steps_than_are_taken_at_once() -> None:
    losses = noisy_descent(40_000, 0.02)
    losses[np.random.default_rng(1).integers(0, 40_000, 300)] += 0.3
    median = median_filter(losses, WINDOW)
    jumps = np.abs(np.diff(losses))
    deviation = np.array([np.median(jumps[i - 100 : i + 100]) for i in range(100, 39_900)]) / 0.953873  # of N(0, 2)
    inside = slice(100, 39_900)
    expected = np.sum(losses[inside] - median[inside] > np.maximum(0.1, 6 * deviation))
    at_the_end = np.sum(losses[39_900:] - median[39_899] > np.maximum(0.1, 6 * deviation[-1]))
    assert expected > 250
    assert count_spikes(losses) == expected + at_the_end


def test_gradient_norms() -> None:
    norms = list(np.random.default_rng(0).exponential(size=5000))
    assert extreme_gradient_norm([*norms, float("nan")]) == pytest.approx(scoreatpercentile(norms, 99.9))
    assert extreme_gradient_norm([float("inf")]) is None
    assert clipped_share([0.5, 1.0, 1.5, float("nan")], 1.0) == 0.5
    assert clipped_share([], 1.0) is None


def test_sensitivity_by_hand() -> None:
    assert learning_rate_sensitivity([2.5, 2.0, 2.3, None], start=5.0) == pytest.approx((0.5 + 0 + 0.3 + 3.0) / 4)
    assert learning_rate_sensitivity([2.0, 7.0, float("inf")], start=4.0) == pytest.approx((0 + 2 + 2) / 3)
