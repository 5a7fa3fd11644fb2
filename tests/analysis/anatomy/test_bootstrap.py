"""Intervals by bootstrap, against the theory of means and against draws one by one."""

import math

import numpy as np
import pytest

from analysis.anatomy.bootstrap import FEWEST, RESAMPLES, Resampled


def test_of_equal_documents_it_is_the_interval_of_a_mean() -> None:
    rng = np.random.default_rng(1)
    means = rng.normal(2.0, 0.5, 400)
    (interval,) = Resampled(np.full(400, 10.0)).intervals(10 * means[None])
    error = means.std(ddof=1) / 20
    assert interval.value == pytest.approx(means.mean())
    assert interval.low == pytest.approx(means.mean() - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(means.mean() + 1.96 * error, abs=0.15 * error)


def test_a_figure_is_a_sum_over_the_tokens_that_were_drawn() -> None:
    tokens, sums = np.array([10.0, 1.0, 5.0] * 3), np.array([[20.0, 5.0, 5.0] * 3, [1.0, 2.0, 3.0] * 3])
    resampled = Resampled(tokens)
    assert resampled.draws.shape == (RESAMPLES, 9)
    assert (resampled.draws.sum(1) == 9).all()
    by_hand = [
        [sum(count * s for count, s in zip(draw, row, strict=True)) / (draw @ tokens) for draw in resampled.draws]
        for row in sums
    ]
    for interval, drawn in zip(resampled.intervals(sums), by_hand, strict=True):
        assert (interval.low, interval.high) == pytest.approx((np.quantile(drawn, 0.025), np.quantile(drawn, 0.975)))
    assert [interval.value for interval in resampled.intervals(sums)] == pytest.approx([30 / 16, 6 / 16])


def test_differences_are_paired() -> None:
    """Documents differ much more than the two models do."""
    rng = np.random.default_rng(0)
    first = rng.normal(0, 10, (1, 50))
    second = first + rng.normal(0.1, 0.01, (1, 50))
    resampled = Resampled(np.ones(50))
    (difference,) = resampled.differences(second, first)
    assert 0.09 < difference.low < difference.high < 0.11
    (alone,) = resampled.intervals(second)
    assert alone.high - alone.low > 100 * (difference.high - difference.low)


def test_the_same_draws_serve_every_model() -> None:
    assert (Resampled(np.ones(7)).draws == Resampled(np.ones(7)).draws).all()


def test_of_few_documents_there_is_no_interval() -> None:
    rng = np.random.default_rng(0)
    for documents in (1, FEWEST - 1):
        first, second = rng.normal(0, 1, (2, 1, documents))
        resampled = Resampled(np.ones(documents))
        for (interval,) in (resampled.intervals(first), resampled.differences(second, first)):
            assert math.isfinite(interval.value)
            assert math.isnan(interval.low)
            assert math.isnan(interval.high)
    (interval,) = Resampled(np.ones(FEWEST)).intervals(rng.normal(0, 1, (1, FEWEST)))
    assert interval.low < interval.value < interval.high
