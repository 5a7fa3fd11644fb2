"""The DataModule of one prepared corpus: shuffled training stream, fixed validation sample."""

from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core.errors import require
from datamodules.counting import MAX_VOCABULARY, bigram_loss, unigram_loss
from datamodules.index import Index
from datamodules.samples import ShuffledSplit
from datamodules.shards import Split
from datamodules.storage import LocalFolder, Storage, read_index
from datamodules.stream import SampleStream
from datamodules.stream_datamodule import StreamDataModule
from datamodules.tokenizers import ByteTokenizer, Tokenizer

VALIDATION_SEED = 0  # the validation sample does not change with the run's seed
BASELINE_TOKENS = 1 << 25  # of the training split, from its beginning


class TokenDataModule(StreamDataModule):
    """Subclasses say where the corpus lies (`folder`) and how it comes there (`prepare_data`).

    Args:
        seq_len, batch_size, val_batches, num_workers, seed: see StreamDataModule.
        document_mask: attention does not cross documents, and positions restart at each; false: documents follow each
            other as if they were one text.
        shuffle_block: None shuffles the whole epoch; a number shuffles blocks of so many neighbouring samples, and the
            samples within each: for remote corpora that are larger than their cache.
    """

    def __init__(
        self,
        seq_len: int,
        batch_size: int,
        val_batches: int,
        num_workers: int,
        seed: int,
        document_mask: bool = False,
        shuffle_block: int | None = None,
    ) -> None:
        super().__init__(seq_len, batch_size, val_batches, num_workers, seed)
        valid = f"null, or an integer >= data.batch_size={batch_size}"
        require(shuffle_block is None or shuffle_block >= batch_size, "data.shuffle_block", shuffle_block, valid)
        self.document_mask, self.shuffle_block = document_mask, shuffle_block
        self._counted: dict[tuple[Callable[..., float], int, int], float] = {}  # losses that take seconds

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Return where the prepared corpus lies."""

    @property
    def storage(self) -> Storage:
        """Return what the corpus is read through."""
        return LocalFolder(self.folder)

    @cached_property
    def index(self) -> Index:
        return read_index(self.storage)

    @property
    def tokenizer(self) -> Tokenizer:
        return ByteTokenizer()

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def split(self, name: str) -> Split:
        return Split(self.storage, self.index, name)

    def samples(self, split: str) -> ShuffledSplit:
        seed, block = (self.seed, self.shuffle_block) if split == "train" else (VALIDATION_SEED, None)
        return ShuffledSplit(self.split(split), self.seq_len, seed, block, self.document_mask)

    @property
    def stream_identity(self) -> dict[str, Any]:
        return {**super().stream_identity, "shuffle_block": self.shuffle_block, "corpus": self.index.digest}

    @property
    def num_train_tokens(self) -> int:
        """Return how many tokens an epoch has."""
        return self.split("train").num_tokens

    @property
    def num_val_samples(self) -> int:
        return self.split("val").num_samples(self.seq_len)

    def check(self) -> None:
        """Hold the prepared corpus against the configuration.

        Raises:
            ConfigError: a split is too short for one sequence, or for one batch.
            CorpusError: the corpus is damaged.
        """
        for name in ("train", "val"):
            self.check_length(name, self.split(name).num_tokens)

    def check_length(self, name: str, num_tokens: int) -> None:
        """Raise ConfigError unless a split of this name and length has a sequence, and a batch of them."""
        most = num_tokens - 1
        require(self.seq_len <= most, "data.seq_len", self.seq_len, f"at most {most}, the {name} split's tokens - 1")
        samples = most // self.seq_len
        require(self.batch_size <= samples, "data.batch_size", self.batch_size, f"at most {samples}: {name} samples")

    def bits_per_byte(self, loss: float) -> float | None:
        split = self.split("val")
        if not split.num_bytes:  # documents without text, or an index that says so
            return None
        return loss / np.log(2) * split.num_tokens / split.num_bytes

    def baseline_loss(self) -> float | None:
        """Return a bigram model's validation loss in nats per token; None where the vocabulary is too large for one."""
        return self._counting_loss(bigram_loss) if self.vocab_size <= MAX_VOCABULARY else None

    def unigram_loss(self) -> float | None:
        return self._counting_loss(unigram_loss)

    def _counting_loss(self, measure: Callable[..., float]) -> float:
        key = measure, self.batch_size, self.num_val_batches
        if key not in self._counted:
            stream = SampleStream(self.samples("val"), self.batch_size)
            samples: npt.NDArray[np.int64]
            samples = np.concatenate([stream.read(n)["tokens"] for n in range(self.num_val_batches)])
            self._counted[key] = measure(self.split("train").head(BASELINE_TOKENS), samples, self.vocab_size)
        return self._counted[key]
