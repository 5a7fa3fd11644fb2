"""The stream of batches: the same global batches however many ranks and workers share them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.order import permute, sample_indices
from datamodules.samples import ShuffledSplit
from datamodules.shards import Split, open_split
from datamodules.stream import SampleStream

SEQ_LEN, BATCH_SIZE, NUM_BATCHES = 16, 4, 7


@pytest.fixture(scope="module")
def split(root: Path) -> Split:
    return open_split(root / "tiny", "val")


def batches(split: Split, num_workers: int = 0, seed: int = 0, **position: int) -> list[Tensor]:
    stream = SampleStream(ShuffledSplit(split, SEQ_LEN, seed), BATCH_SIZE, num_batches=NUM_BATCHES, **position)
    return [batch["tokens"] for batch in DataLoader(stream, batch_size=None, num_workers=num_workers)]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_global_batches_do_not_depend_on_ranks_and_workers(split: Split, world_size: int, num_workers: int) -> None:
    by_rank = [batches(split, num_workers, rank=rank, world_size=world_size) for rank in range(world_size)]
    together = [torch.cat(parts) for parts in zip(*by_rank, strict=True)]
    order = permute(np.arange(NUM_BATCHES * BATCH_SIZE), split.num_samples(SEQ_LEN), 0, 0)
    for batch, indices in zip(together, order.reshape(NUM_BATCHES, BATCH_SIZE), strict=True):
        windows = [split.tokens[i * SEQ_LEN : (i + 1) * SEQ_LEN + 1] for i in indices]
        np.testing.assert_array_equal(batch.numpy(), np.stack(windows))


def test_a_stream_goes_on_where_another_one_stopped(split: Split) -> None:
    whole = batches(split)
    for consumed in (1, 3):
        rest = batches(split, first_sample=consumed * BATCH_SIZE)
        assert all(torch.equal(a, b) for a, b in zip(whole[consumed:], rest, strict=False))
    assert not torch.equal(whole[0], batches(split, seed=1)[0])


def test_an_epoch_ends_amid_a_batch_and_nothing_is_skipped(split: Split) -> None:
    size = split.num_samples(SEQ_LEN)
    assert size % BATCH_SIZE, "the tiny corpus should not divide into batches"
    stream = SampleStream(ShuffledSplit(split, SEQ_LEN, seed=5), BATCH_SIZE)
    seen = np.concatenate([stream.read(n)["tokens"] for n in range(-(-2 * size // BATCH_SIZE))])[: 2 * size]
    expected = sorted(split.read(np.arange(size), SEQ_LEN).tolist())
    first, second = seen[:size].tolist(), seen[size:].tolist()
    assert first != second
    assert sorted(first) == sorted(second) == expected


def test_without_num_batches_it_never_ends(split: Split) -> None:
    batches = iter(SampleStream(ShuffledSplit(split, SEQ_LEN, seed=0), BATCH_SIZE))
    num_batches = 3 * split.num_samples(SEQ_LEN) // BATCH_SIZE
    assert sum(1 for _, _ in zip(range(num_batches), batches, strict=False)) == num_batches


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    share=st.integers(1, 3),
    worlds=st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4),
    batches=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    seq_len=st.integers(1, 200),
    block=st.none() | st.integers(36, 200),
    seed=st.integers(0, 2**32 - 1),
)
def test_stops_and_other_world_sizes_leave_the_stream_what_it_is(
    split: Split, share: int, worlds: list[int], batches: list[int], seq_len: int, block: int | None, seed: int
) -> None:
    """A run of several parts, each in another number of ranks: 0 samples missed, 0 repeated."""
    batch_size, first, seen = 12 * share, 0, []
    for world_size, num_batches in zip(worlds, batches, strict=False):
        samples = ShuffledSplit(split, seq_len, seed, block)
        ranks = [SampleStream(samples, batch_size, first, num_batches, rank, world_size) for rank in range(world_size)]
        for parts in zip(*ranks, strict=True):
            seen += torch.cat([part["tokens"] for part in parts]).tolist()
        first += num_batches * batch_size
    size = split.num_samples(seq_len)
    order = sample_indices(np.arange(first), size, seed, block)
    assert seen == split.read(order, seq_len).tolist()
    windows = split.read(np.arange(size), seq_len).tolist()
    for epoch in range(first // size):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == sorted(windows)


@pytest.mark.parametrize(("block", "most"), [(None, 32), (64, 8), (8, 1)])
def test_what_is_read_at_once_does_not_go_beyond_the_next_block(block: int | None, most: int) -> None:
    """Else a cache would have to hold shards of more blocks than it counts on."""
    asked: list[np.ndarray] = []

    class Kept:
        def __init__(self) -> None:
            self.block = block

        def read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
            asked.append(numbers)
            return {"tokens": np.zeros((len(numbers), 3), np.int64)}

    batches: Any = SampleStream(Kept(), batch_size=8, num_batches=100)  # type: ignore[arg-type]
    assert sum(len(batch["tokens"]) for batch in batches) == 800
    assert max(len(numbers) for numbers in asked) == 8 * most
    assert np.concatenate(asked).tolist() == list(range(800))
