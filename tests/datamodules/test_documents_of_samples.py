"""Which document a predicted token is of, against documents counted from the beginning of the split."""

from pathlib import Path

import numpy as np

from datamodules.mixture import MixedSamples, Pattern
from datamodules.order import sample_indices
from datamodules.samples import ShuffledSplit
from datamodules.shards import open_split
from datamodules.writer import write_corpus
from tests.support.runs import DESCRIPTION


def corpus(folder: Path, lengths: list[int]) -> Path:
    """A corpus whose validation documents have these lengths."""
    rng = np.random.default_rng(0)
    texts = [("train", bytes(50), np.zeros(50, np.uint16))]
    texts += [("val", bytes(n), rng.integers(0, 256, n).astype(np.uint16)) for n in lengths]
    write_corpus(folder, iter(texts), 64, DESCRIPTION)
    return folder


def test_documents_are_those_counted_from_the_beginning(tmp_path: Path) -> None:
    """With documents longer than a sequence, shorter, empty, and of whole sequences."""
    lengths = [70, 3, 0, 5, 200, 15, 31]
    split = open_split(corpus(tmp_path / "a", lengths), "val")
    begins = np.cumsum([0, *(n + 1 for n in lengths)])  # a token at the end of each
    for seq_len in (4, 16, 33):
        samples = ShuffledSplit(split, seq_len, seed=3)
        numbers = np.arange(samples.num_samples)
        places = sample_indices(numbers, samples.num_samples, 3)[:, None] * seq_len + 1 + np.arange(seq_len)
        expected = begins[np.searchsorted(begins, places, side="right") - 1]
        np.testing.assert_array_equal(samples.documents(numbers), expected)


def test_documents_of_a_mixture_are_of_one_source_each(tmp_path: Path) -> None:
    parts = [ShuffledSplit(open_split(corpus(tmp_path / name, [70, 30, 40]), "val"), 8, seed=0) for name in ("a", "b")]
    samples = MixedSamples(parts, Pattern([1.0, 1.0], 0))
    numbers = np.arange(8)
    named, sources = samples.documents(numbers), samples.read(numbers)["source"]
    assert set(sources.tolist()) == {0, 1}
    assert not set(named[sources == 0].ravel()) & set(named[sources == 1].ravel())
    np.testing.assert_array_equal(named[:1] // 2, parts[sources[0]].documents(samples.pattern.places(numbers)[1][:1]))
