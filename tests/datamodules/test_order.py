"""The order of the samples: a permutation for each epoch and seed, computed and never held."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from datamodules.order import permute, sample_indices

SEEDS = st.integers(0, 2**32 - 1)


@given(num_samples=st.integers(1, 600), seed=SEEDS, epoch=st.integers(0, 2**31))
@example(num_samples=1, seed=0, epoch=0)
@example(num_samples=256, seed=0, epoch=0)
@example(num_samples=257, seed=0, epoch=0)
@settings(deadline=None)
def test_every_epoch_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    order = permute(np.arange(num_samples), num_samples, seed, epoch)
    assert sorted(order.tolist()) == list(range(num_samples))


@given(num_samples=st.integers(1, 50), seed=SEEDS, first=st.integers(0, 100), length=st.integers(0, 60))
@settings(deadline=None)
def test_any_window_of_the_stream_is_that_part_of_the_epochs(
    num_samples: int, seed: int, first: int, length: int
) -> None:
    epochs = range((first + length) // num_samples + 1)
    whole = np.concatenate([permute(np.arange(num_samples), num_samples, seed, epoch) for epoch in epochs])
    window = sample_indices(np.arange(first, first + length), num_samples, seed)
    assert window.dtype == np.int64
    np.testing.assert_array_equal(window, whole[first : first + length])


def test_the_order_differs_between_epochs_and_seeds_and_from_the_identity() -> None:
    positions = np.arange(1000)
    orders = [permute(positions, 1000, seed, epoch) for seed in range(4) for epoch in range(4)]
    for n, order in enumerate([positions, *orders]):
        for other in orders[n:]:
            assert np.mean(order == other) < 0.02  # two random permutations agree in one place of a thousand


def test_neighbours_are_spread_evenly() -> None:
    first = permute(np.arange(100), 100_000, seed=0, epoch=0)
    assert abs(first.mean() - 50_000) < 10_000  # 3.5 standard errors
    assert np.histogram(first, bins=4, range=(0, 100_000))[0].min() > 10


@pytest.mark.parametrize("num_samples", [10**9, 2**40])
def test_a_huge_corpus_costs_no_more_than_a_small_one(num_samples: int) -> None:
    positions = np.array([0, 1, num_samples // 2, num_samples - 1])
    order = permute(positions, num_samples, seed=1, epoch=2)
    assert len(set(order.tolist())) == 4
    assert ((order >= 0) & (order < num_samples)).all()
    numbers = sample_indices(positions + 2 * num_samples, num_samples, seed=1)
    np.testing.assert_array_equal(numbers, order)
