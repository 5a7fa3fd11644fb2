"""A mixture: exact shares, every source consumed one sample after the other, each source's loss apart."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from core.errors import ConfigError
from datamodules.mixture import BLOCK, Mixture, Pattern, shares
from datamodules.stream import SampleStream
from datamodules.writer import write_corpus
from tests.support.runs import run_on, scalars

WEIGHTS = st.lists(st.floats(0.01, 1), min_size=1, max_size=5)


@given(weights=WEIGHTS)
def test_shares_are_the_weights_to_one_place(weights: list[float]) -> None:
    counts = shares(weights)
    assert counts.sum() == BLOCK
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - BLOCK * weight / sum(weights)) < 1


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=30)
@given(weights=WEIGHTS, seed=st.integers(0, 2**32 - 1), data=st.data())
def test_every_source_gives_its_samples_one_after_the_other(weights: list[float], seed: int, data: Any) -> None:
    sources, within = Pattern(weights, seed).places(np.arange(2 * BLOCK))
    for source, count in enumerate(shares(weights)):
        assert within[sources == source].tolist() == list(range(2 * count))
    some = data.draw(st.lists(st.integers(0, 2 * BLOCK - 1), min_size=1, max_size=9))
    fresh = Pattern(weights, seed).places(np.array(some))  # knows nothing of what came before
    assert [part.tolist() for part in fresh] == [sources[some].tolist(), within[some].tolist()]


def test_far_into_the_stream_it_is_as_cheap_and_as_exact() -> None:
    far = 10**12 * BLOCK
    sources, within = Pattern([3, 1], seed=1).places(np.arange(far, far + BLOCK))
    assert np.bincount(sources).tolist() == [3 * BLOCK // 4, BLOCK // 4]
    assert within[sources == 1].tolist() == list(range(far // 4, far // 4 + BLOCK // 4))


def test_places_are_shuffled_differently_in_each_block_and_for_each_seed() -> None:
    patterns = [
        Pattern([1, 1], seed).places(np.arange(b * BLOCK, (b + 1) * BLOCK))[0] for seed in (0, 1) for b in (0, 1)
    ]
    for n, pattern in enumerate(patterns):
        runs = np.count_nonzero(np.diff(pattern)) + 1
        assert abs(runs - BLOCK / 2) < 4 * math.sqrt(BLOCK) / 2  # as many changes as coin flips have
        assert all(abs(np.mean(pattern == other) - 0.5) < 0.05 for other in patterns[:n])


def test_huge_weights_have_the_shares_of_their_ratios() -> None:
    assert shares([1.5e308, 0.5e308]).tolist() == shares([3, 1]).tolist()
    assert shares([10**30, 10**30]).tolist() == [BLOCK // 2] * 2


@given(weights=st.lists(st.integers(1, 9), min_size=2, max_size=3), data=st.data())
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=20)
def test_validation_ends_before_a_source_repeats_itself(weights: list[float], data: Any) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9000), min_size=len(weights), max_size=len(weights)))
    pattern = Pattern(weights, 0)
    number = pattern.num_distinct(sizes)
    sources, within = pattern.places(np.arange(number + 1))
    over = within >= np.array(sizes)[sources]
    assert over.tolist() == [False] * number + [True]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three corpora: one of letters, one of digits, one with another vocabulary."""
    root = tmp_path_factory.mktemp("mixture")
    rng = np.random.default_rng(0)
    for name, alphabet, vocab_size in (("letters", b"abc", 257), ("digits", b"0123", 257), ("other", b"xy", 300)):
        texts = [bytes(rng.choice(list(alphabet), 4000).tolist()) for _ in range(4)]
        documents = [
            (split, text, np.frombuffer(text, np.uint8).astype(np.uint16))
            for split in ("train", "val")
            for text in texts
        ]
        write_corpus(root / name, documents, 256, {"vocab_size": vocab_size})
    return [str(root / name) for name in ("letters", "digits", "other")]


def mixture(folders: list[str], **changes: Any) -> Mixture:
    sizes: dict[str, Any] = {"paths": folders[:2], "weights": [3, 1], "seq_len": 16, "batch_size": 4, "seed": 0}
    return Mixture(**{**sizes, **changes})


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [2, 4])
def test_batches_do_not_depend_on_ranks_and_workers(folders: list[str], world_size: int, num_workers: int) -> None:
    samples = mixture(folders).samples("train")
    whole = list(SampleStream(samples, 4, num_batches=9))
    parts = [
        list(DataLoader(SampleStream(samples, 4, 0, 9, rank, world_size), batch_size=None, num_workers=num_workers))
        for rank in range(world_size)
    ]
    for batch, *shared in zip(whole, *parts, strict=True):
        for key in ("tokens", "source"):
            assert torch.equal(batch[key], torch.cat([part[key] for part in shared]))


def test_a_batch_says_which_source_a_row_is_from(folders: list[str]) -> None:
    data = mixture(folders)
    data.check()
    rows = data.samples("train").read(np.arange(BLOCK))
    assert np.bincount(rows["source"]).tolist() == [3 * BLOCK // 4, BLOCK // 4]
    assert data.source_names == ("letters", "digits")
    for source, alphabet in enumerate((b"abc", b"0123")):
        assert set(np.unique(rows["tokens"][rows["source"] == source])) <= {*alphabet, 256}


def test_an_epoch_of_a_source_is_a_permutation_of_it(folders: list[str]) -> None:
    samples = mixture(folders).samples("train")
    rows = samples.read(np.arange(2 * BLOCK))
    size = samples.sources[1].num_samples
    seen = rows["tokens"][rows["source"] == 1][:size]
    expected = samples.sources[1].split.read(np.arange(size), 16)
    assert sorted(seen.tolist()) == sorted(expected.tolist())


@pytest.mark.parametrize(
    ("changes", "field", "valid"),
    [
        ({"paths": []}, "data.paths", "the folders of prepared corpora"),
        ({"weights": [1]}, "data.weights", "2 numbers, one for each of data.paths"),
        ({"weights": [1, 0]}, "data.weights", "positive numbers"),
        ({"weights": [math.inf, 1]}, "data.weights", "finite numbers"),
        ({"weights": [1, math.nan]}, "data.weights", "finite numbers"),
        ({"weights": [True, "1"]}, "data.weights", "finite numbers"),
        ({"weights": [10**400, 1]}, "data.weights", "finite numbers"),
        ({"weights": [1, 1e-5]}, "data.weights", "at least 1/4096 of their sum each"),
        ({"paths": ["a/x", "b/x"]}, "data.paths", "names that differ, not x, x"),
        ({"shuffle_block": 3}, "data.shuffle_block", "null, or an integer >= data.batch_size=4"),
    ],
)
def test_what_cannot_be_mixed_is_refused(folders: list[str], changes: dict[str, Any], field: str, valid: str) -> None:
    with pytest.raises(ConfigError) as error:
        mixture(folders, **changes)
    assert (error.value.field, error.value.valid) == (field, valid)


def test_corpora_of_different_vocabularies_are_not_mixed(folders: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"corpora of one tokenizer; .*other has byte, not byte"):
        mixture(folders, paths=[folders[0], folders[2]]).check()


def test_corpora_whose_documents_end_otherwise_are_not_mixed(folders: list[str], tmp_path: Path) -> None:
    """Of one tokenizer, prepared with another end_of_document each: the model would read both tokens as ends."""
    text = b"xy" * 2000
    documents = [(split, text, np.frombuffer(text, np.uint8).astype(np.uint16)) for split in ("train", "val")]
    write_corpus(tmp_path / "zeros", documents, 0, {"vocab_size": 257})
    with pytest.raises(ConfigError, match=r"documents one token closes; in .*zeros it is 0, in .*letters 256"):
        mixture(folders, paths=[folders[0], str(tmp_path / "zeros")]).check()


@pytest.mark.parametrize("way", ["link", "relative", "copy"])
def test_a_corpus_is_not_mixed_with_itself(
    way: str, folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "again"
    if way == "copy":
        shutil.copytree(folders[0], other)
    else:
        other.symlink_to(folders[0])
    monkeypatch.chdir(tmp_path)
    again = "again" if way == "relative" else str(other)
    with pytest.raises(ConfigError, match=rf"data\.paths=.*: {folders[0]} and {again} hold the same corpus"):
        mixture(folders, paths=[folders[0], folders[1], again], weights=[1, 1, 1]).check()


def test_a_run_reports_each_source(folders: list[str], tmp_path: Path) -> None:
    """Letters cost ln 3 and digits ln 4 nats at best; the whole is the mean, weighted by what came."""
    paths = ["data=mixture", f"data.paths=[{folders[0]},{folders[1]}]", "data.weights=[3,1]"]
    data = ["data.val_batches=64", "trainer.max_steps=30", "optim.lr=1e-2"]
    folder = run_on(tmp_path, "experiment=dense_prenorm", *paths, *data)
    val = {name: list(scalars(folder, f"val/loss{name}").values())[-1] for name in ("", "/letters", "/digits")}
    assert val["/letters"] < val["/digits"]
    counts = np.bincount(mixture(folders, seq_len=32).samples("val").read(np.arange(64 * 4))["source"])
    mean = (counts[0] * val["/letters"] + counts[1] * val["/digits"]) / counts.sum()
    assert val[""] == pytest.approx(mean, rel=1e-4)
    assert len(scalars(folder, "train/loss/letters")) > 25
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["val_bits_per_byte"] == pytest.approx(val[""] / math.log(2) * 4001 / 4000, rel=1e-4)
    assert summary["bigram_loss"] is None
