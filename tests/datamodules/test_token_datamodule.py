"""The DataModule: what it refuses, where it stands after a stop, and its units."""

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from core.errors import ConfigError
from datamodules.stream import SampleStream
from tests.support.runs import TEXT, TinyData


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("seq_len", 0, ">= 1"),
        ("batch_size", 0, ">= 1"),
        ("val_batches", 0, ">= 1"),
        ("num_workers", -1, ">= 0"),
        ("seed", -1, ">= 0"),
    ],
)
def test_values_out_of_range_are_refused(root: Path, name: str, value: int, valid: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{name}={value} is not valid: expected an integer {valid}"):
        TinyData(root, **{name: value})


@pytest.mark.parametrize(
    ("overrides", "field", "valid"),
    [
        ({"seq_len": 10**6}, "data.seq_len", "the train split's tokens - 1"),
        ({"seq_len": len(TEXT) // 10 + 1}, "data.seq_len", f"at most {len(TEXT) // 10}, the val split's"),
        ({"seq_len": len(TEXT) // 10}, "data.batch_size", "at most 1: val samples"),
        ({"batch_size": 10**6}, "data.batch_size", "train samples"),
    ],
)
def test_a_corpus_too_short_is_refused(root: Path, overrides: dict[str, int], field: str, valid: str) -> None:
    with pytest.raises(ConfigError) as error:
        TinyData(root, **overrides).check()
    assert error.value.field == field
    assert valid in error.value.valid


def test_ranks_must_share_a_batch_evenly(root: Path) -> None:
    data = TinyData(root, batch_size=3)
    data.trainer = fake_trainer(world_size=2)
    with pytest.raises(
        ConfigError, match=r"data\.batch_size=3 .* a multiple of the number of data-parallel processes, 2"
    ):
        data.val_dataloader()


def fake_trainer(step: int = 0, accumulate: int = 1, world_size: int = 1) -> Any:
    device = SimpleNamespace(root_device=SimpleNamespace(type="cpu"))
    sizes = {"accumulate_grad_batches": accumulate, "world_size": world_size, "global_rank": 0}
    loop = SimpleNamespace(restarting=False)
    return SimpleNamespace(
        global_step=step,
        current_epoch=0,
        callbacks=[],
        limit_train_batches=1.0,
        strategy=device,
        fit_loop=loop,
        **sizes,
    )


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_position_follows_the_optimizer_step_through_two_stops(root: Path, accumulate: int) -> None:
    """Stopped after step 4, then after step 6: the third process starts with sample 6 x accumulate x batch_size."""
    state, step = {"samples": 0, "step": 0}, 0
    for done in (4, 2):
        data = TinyData(root)
        data.trainer = fake_trainer(0, accumulate)
        data.load_state_dict(state)  # Lightning restores the step after this
        data.trainer.global_step = step
        data.train_dataloader()
        step += done
        data.trainer.global_step = step
        state = json.loads(json.dumps(data.state_dict()))  # plain values only
    index = json.loads((root / "tiny/index.json").read_text())
    sums = [shard["sha256"] for name in ("train", "val") for shard in index["splits"][name]["shards"]]
    digest = hashlib.sha256(" ".join(sums).encode()).hexdigest()[:16]
    identity = {"seq_len": 32, "seed": 0, "shuffle_block": None, "corpus": digest}
    assert state == {"samples": 6 * accumulate * 4, "step": 6, "stream_identity": identity}
    data = TinyData(root)
    data.trainer = fake_trainer(6, accumulate)
    data.load_state_dict(state)
    stream = data.train_dataloader().dataset
    assert isinstance(stream, SampleStream)
    assert stream.first_sample == 6 * accumulate * 4


def test_the_validation_sample_is_fixed_and_bounded(root: Path) -> None:
    def sample(**arguments: Any) -> list[bytes]:
        batches = [batch["tokens"].numpy() for batch in TinyData(root, **arguments).val_dataloader()]
        return [row.tobytes() for batch in batches for row in batch]

    assert sample(seed=0) == sample(seed=1)
    assert len(sample(val_batches=3)) == 3 * 4
    everything, tokens = sample(val_batches=10**6), np.load(root / "tiny/val-00000.npy").astype(np.int64)
    windows = Counter(tokens[start : start + 33].tobytes() for start in range(0, len(tokens) - 32, 32))
    assert len(everything) == windows.total() // 4 * 4
    assert Counter(everything) <= windows, "no window comes twice"


def test_nats_per_token_become_bits_per_byte(root: Path) -> None:
    num_bytes = len(TEXT) // 10  # of the one validation document, which has an end-of-document token beside
    assert TinyData(root).bits_per_byte(2.0) == pytest.approx(2.0 / math.log(2) * (num_bytes + 1) / num_bytes)
    assert TinyData(root).tokens_per_batch == 4 * 32


def test_the_baseline_is_measured_on_the_validation_sample(root: Path) -> None:
    data = TinyData(root)
    rows = np.concatenate([batch["tokens"].numpy() for batch in data.val_dataloader()])
    counts = np.ones((257, 257))
    train = np.load(root / "tiny/train-00000.npy")
    np.add.at(counts, (train[:-1], train[1:]), 1)
    losses = np.log(counts.sum(1))[rows[:, :-1]] - np.log(counts[rows[:, :-1], rows[:, 1:]])
    assert data.baseline_loss() == pytest.approx(losses.mean())


def test_no_baseline_for_a_vocabulary_whose_pairs_are_not_counted(root: Path) -> None:
    class Large(TinyData):
        vocab_size = (1 << 16) + 1

    assert Large(root).baseline_loss() is None
