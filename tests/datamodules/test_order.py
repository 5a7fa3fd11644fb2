"""The order of the samples: a permutation for each epoch and seed, computed and never held."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from datamodules.order import block_bounds, permute, sample_indices

SEEDS = st.integers(0, 2**32 - 1)


@given(num_samples=st.integers(1, 600), seed=SEEDS, epoch=st.integers(0, 2**31))
@example(num_samples=1, seed=0, epoch=0)
@example(num_samples=256, seed=0, epoch=0)
@example(num_samples=257, seed=0, epoch=0)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_every_epoch_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    order = permute(np.arange(num_samples), num_samples, seed, epoch)
    assert sorted(order.tolist()) == list(range(num_samples))


@given(num_samples=st.integers(1, 50), seed=SEEDS, first=st.integers(0, 100), length=st.integers(0, 60))
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
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


def chi_square(counts: np.ndarray) -> float:
    """Standard deviations by which the statistic of a uniform distribution lies above its mean."""
    expected = counts.sum() / counts.size
    statistic = float(((counts - expected) ** 2).sum() / expected)
    return (statistic - (counts.size - 1)) / math.sqrt(2 * (counts.size - 1))


PLACES = np.array([0, 1, 2, 350, 351, 698, 699])


@pytest.mark.parametrize("block", [None, 64])
@pytest.mark.parametrize("what", ["seeds", "epochs"])
def test_every_sample_is_equally_likely_at_every_place(what: str, block: int | None) -> None:
    """Chi-square over 2,000 independent orders of 700 samples, for the samples in 35 classes."""
    if what == "seeds":
        orders = np.stack([sample_indices(PLACES, 700, seed, block) for seed in range(2000)])
    else:
        numbers = PLACES + 700 * np.arange(2000)[:, None]
        orders = sample_indices(numbers.ravel(), 700, 3, block).reshape(numbers.shape)
    classes = orders // 20
    for column in classes.T:
        assert abs(chi_square(np.bincount(column, minlength=35))) < 4
    if block is None:  # then a sample says nothing of the next one either
        pairs = np.bincount(classes[:, 0] * 35 + classes[:, 1], minlength=35**2)
        assert abs(chi_square(pairs)) < 4


@pytest.mark.parametrize("num_samples", [100_000, 10**9])
def test_the_beginning_of_an_epoch_is_spread_evenly_over_the_corpus(num_samples: int) -> None:
    first = sample_indices(np.arange(20_000), num_samples, seed=0)
    assert abs(chi_square(np.histogram(first, bins=100, range=(0, num_samples))[0])) < 4
    moves = np.diff(first)
    assert abs(np.mean(moves > 0) - 0.5) < 4 * 0.5 / math.sqrt(len(moves))


def pieces(values: list[int], size: int) -> list[list[int]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


@given(num_samples=st.integers(1, 300), block=st.integers(1, 320), seed=SEEDS)
@example(num_samples=12, block=5, seed=0)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_blocks_are_shuffled_and_so_is_what_is_in_them(num_samples: int, block: int, seed: int) -> None:
    """Two epochs, each a permutation; every block is a stretch of neighbours, over the end to the beginning if need
    be, and it is the stretch that block_bounds tells."""
    order = sample_indices(np.arange(2 * num_samples), num_samples, seed, block)
    for epoch in (0, 1):
        part = order[epoch * num_samples : (epoch + 1) * num_samples].tolist()
        assert sorted(part) == list(range(num_samples))
        for start, indices in zip(itertools.count(0, block), pieces(part, block), strict=False):
            first, count = block_bounds(epoch * num_samples + start, num_samples, seed, block)
            assert sorted(indices) == sorted((first + n) % num_samples for n in range(count))


def test_blocks_start_elsewhere_each_epoch() -> None:
    """The last block of an epoch, shorter than the others, is not always made of the same samples."""
    lasts = [sample_indices(np.arange(1000 * e + 900, 1000 * e + 1000), 1000, 0, 450) for e in range(50)]
    assert len({int(last.min()) for last in lasts}) > 40


@pytest.mark.parametrize("num_samples", [10**9, 2**40])
def test_a_huge_corpus_costs_no_more_than_a_small_one(num_samples: int) -> None:
    positions = np.array([0, 1, num_samples // 2, num_samples - 1])
    order = permute(positions, num_samples, 1, 2)
    assert len(set(order.tolist())) == 4
    assert ((order >= 0) & (order < num_samples)).all()
    numbers = sample_indices(positions + 2 * num_samples, num_samples, seed=1)
    np.testing.assert_array_equal(numbers, order)


def test_memory_is_flat() -> None:
    peaks = []
    for num_samples in (10**4, 10**9):
        tracemalloc.start()
        sample_indices(np.arange(64) + num_samples - 32, num_samples, seed=1)
        sample_indices(np.arange(64) + num_samples - 32, num_samples, seed=1, block=1000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0] < 1e5  # a permutation of 10^9 would take 8 GB
