"""Several corpora mixed with weights."""

import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core.errors import ConfigError, InvalidValue, require
from datamodules.order import permute
from datamodules.samples import Numbers, Rows, ShuffledSplit
from datamodules.shard_corpus import ShardCorpus, require_room
from datamodules.stream_datamodule import StreamDataModule
from datamodules.token_datamodule import VALIDATION_SEED
from datamodules.tokenizers import Tokenizer

BLOCK = 4096  # samples in which every source has its exact share


class Pattern:
    """Tells which source a sample comes from, and which sample of it that is: a function of its number and a seed.

    In each block of BLOCK samples every source has the same number of places, in an order that is shuffled anew, and
    takes its own samples one after the other. So nothing is drawn and nothing has to be counted from the beginning.

    Args:
        weights: of the sources; only their ratios matter.
        seed: of the order of the places.
    """

    def __init__(self, weights: list[float], seed: int) -> None:
        self.counts, self.seed = shares(weights), seed
        self._block: tuple[int, Numbers, Numbers] | None = None

    def places(self, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """Sample numbers -> (sources, numbers of the samples within their sources)."""
        sources, within = np.empty_like(numbers), np.empty_like(numbers)
        blocks = numbers // BLOCK
        for block in np.unique(blocks).tolist():
            here = blocks == block
            sources_of_block, ranks = self._pattern(block)
            positions = numbers[here] % BLOCK
            sources[here] = sources_of_block[positions]
            within[here] = block * self.counts[sources[here]] + ranks[positions]
        return sources, within

    def _pattern(self, block: int) -> tuple[Numbers, Numbers]:
        """Return (source of each place of the block, how many places before it have the same source)."""
        if self._block is None or self._block[0] != block:
            order = permute(np.arange(BLOCK), BLOCK, self.seed, block)
            sources = np.searchsorted(self.counts.cumsum(), order, side="right")
            ranks = np.empty(BLOCK, np.int64)
            ranks[np.argsort(sources, kind="stable")] = np.concatenate([np.arange(count) for count in self.counts])
            self._block = block, sources, ranks
        return self._block[1], self._block[2]

    def num_distinct(self, num_samples: list[int]) -> int:
        """Return how many samples come before one of the sources, of these sizes, has to begin anew."""
        sizes = np.array(num_samples)
        whole = int((sizes // self.counts).min())
        sources, ranks = self._pattern(whole)
        exhausted = whole * self.counts[sources] + ranks >= sizes[sources]
        return whole * BLOCK + int(exhausted.argmax())


def shares(weights: list[float]) -> Numbers:
    """Return how many places each source has in a block, in proportion to the weights (largest remainders).

    Raises:
        ConfigError: a weight is not positive, or too small for a single place.
    """
    require(all(map(_is_finite, weights)), "data.weights", weights, "finite numbers")
    require(all(weight > 0 for weight in weights), "data.weights", weights, "positive numbers")
    ratios = np.array(weights, np.float64) / max(weights)  # the sum of huge ones would be infinite
    exact = BLOCK * ratios / ratios.sum()
    counts: npt.NDArray[np.int64] = np.floor(exact).astype(np.int64)
    for source in np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]:
        counts[source] += 1
    require(bool(counts.min() >= 1), "data.weights", weights, f"at least 1/{BLOCK} of their sum each")
    return counts


def _is_finite(weight: object) -> bool:
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        return False
    return abs(weight) <= sys.float_info.max


class MixedSamples:
    """Samples of several sources; rows have "source" besides, int64 [samples]."""

    def __init__(self, sources: list[ShuffledSplit], pattern: Pattern) -> None:
        self.sources, self.pattern = sources, pattern

    def read(self, numbers: Numbers) -> Rows:
        sources, within = self.pattern.places(numbers)
        rows: Rows = {}
        for source in np.unique(sources).tolist():
            here = sources == source
            for name, part in self.sources[source].read(within[here]).items():
                rows.setdefault(name, np.empty((len(numbers), *part.shape[1:]), part.dtype))[here] = part
        return {**rows, "source": sources}

    def documents(self, numbers: Numbers) -> Numbers:
        """Return a number for the document of each predicted token, [samples, seq_len]: see ShuffledSplit."""
        sources, within = self.pattern.places(numbers)
        parts = [self.sources[source].documents(within[n : n + 1])[0] for n, source in enumerate(sources.tolist())]
        return np.stack(parts) * len(self.sources) + sources[:, None]


class Mixture(StreamDataModule):
    """Trains on several prepared corpora at once (data=mixture); all were made with the same tokenizer.

    Args:
        paths: their folders; a source is named after the last part of its path.
        weights: how much of the samples each gives; only their ratios matter.
        seq_len, batch_size, val_batches, num_workers, seed: see StreamDataModule.
        document_mask, shuffle_block: see TokenDataModule.
        cache_dir, cache_gb: see ShardCorpus; for all sources together.
    """

    def __init__(
        self,
        paths: list[str],
        weights: list[float],
        seq_len: int,
        batch_size: int,
        val_batches: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        document_mask: bool = False,
        shuffle_block: int | None = None,
        cache_dir: str = "data/cache",
        cache_gb: float = 50.0,
    ) -> None:
        super().__init__(seq_len, batch_size, val_batches, num_workers, seed)
        require(len(paths) >= 1, "data.paths", paths, "the folders of prepared corpora")
        valid = f"{len(paths)} numbers, one for each of data.paths"
        require(len(weights) == len(paths), "data.weights", weights, valid)
        shares(weights)
        self.source_names = tuple(Path(path).name for path in paths)
        names = ", ".join(self.source_names)
        require(len(set(self.source_names)) == len(paths), "data.paths", paths, f"names that differ, not {names}")
        self.weights = weights
        # Seeds of their own: with one seed, sources of the same size would be read in the same order.
        seeds = np.random.SeedSequence([seed, len(paths)]).generate_state(len(paths)).tolist()
        reading = (document_mask, shuffle_block, cache_dir, cache_gb)
        self.corpora = [
            ShardCorpus(path, seq_len, batch_size, val_batches, num_workers, own, *reading)
            for path, own in zip(paths, seeds, strict=True)
        ]
        self.save_hyperparameters()

    @property
    def stream_identity(self) -> dict[str, Any]:
        sources = {"sources": list(self.source_names), "weights": self.weights}
        corpora = {"corpus": [corpus.index.digest for corpus in self.corpora]}
        return {**super().stream_identity, **sources, "shuffle_block": self.corpora[0].shuffle_block, **corpora}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.corpora[0].tokenizer

    @property
    def vocab_size(self) -> int:
        return self.corpora[0].vocab_size

    def samples(self, split: str) -> MixedSamples:
        seed = self.seed if split == "train" else VALIDATION_SEED
        return MixedSamples([corpus.samples(split) for corpus in self.corpora], Pattern(self.weights, seed))

    @property
    def num_val_samples(self) -> int:
        sizes = [corpus.num_val_samples for corpus in self.corpora]
        return Pattern(self.weights, VALIDATION_SEED).num_distinct(sizes)

    def check(self) -> None:
        """Hold the corpora against the configuration, and against each other.

        Raises:
            ConfigError: a split is too short, two of the corpora are the same, they were made with different
                tokenizers or other tokens that close documents, or the cache is too small for them together.
            CorpusError: a corpus is damaged.
        """
        first = self.corpora[0].index
        by_digest: dict[str, ShardCorpus] = {}
        for corpus in self.corpora:
            corpus.check()
            index = corpus.index
            twin = by_digest.setdefault(index.digest, corpus)
            if twin is not corpus:  # by a link, another way of writing its path, or a copy
                reason = f"{twin.path} and {corpus.path} hold the same corpus, which would count twice"
                raise InvalidValue(
                    "data.paths", [c.path for c in self.corpora], f"{reason}; data.weights gives its share"
                )
            same = (index.tokenizer_sha256, index.vocab_size) == (first.tokenizer_sha256, first.vocab_size)
            if not same:
                valid = f"corpora of one tokenizer; {corpus.path} has {index.tokenizer}, not {first.tokenizer}"
                raise ConfigError("data.paths", [c.path for c in self.corpora], valid)
            valid = (
                f"corpora whose documents one token closes; in {corpus.path} it is {index.end_of_document}, "
                f"in {self.corpora[0].path} {first.end_of_document}"
            )
            ends_alike = index.end_of_document == first.end_of_document
            require(ends_alike, "data.paths", [c.path for c in self.corpora], valid)
        require_room(self.corpora)
        most = self.num_val_samples
        valid = f"at most {most}: validation samples before a source repeats itself"
        require(self.batch_size <= most, "data.batch_size", self.batch_size, valid)

    def bits_per_byte(self, loss: float) -> float | None:
        counts = shares(self.weights)
        splits = [corpus.split("val") for corpus in self.corpora]
        bytes_per_token = sum(
            count / BLOCK * split.num_bytes / split.num_tokens for count, split in zip(counts, splits, strict=True)
        )
        return float(loss / np.log(2) / bytes_per_token) if bytes_per_token else None
