"""A DataModule of sequences of tokens: an endless, stateless stream."""

from abc import abstractmethod
from typing import Any

from core.errors import require
from core.limits import require_at_most
from datamodules.endless_datamodule import EndlessDataModule
from datamodules.tokenizer_folder import check_tokenizer
from datamodules.tokenizers import NumberTokenizer, Tokenizer, Vocabulary

MAX_SEQ_LEN = 2**24
MAX_BATCH_TOKENS = 2**28  # of a batch's sequences together, over all processes


class StreamDataModule(EndlessDataModule):
    """Subclasses say what the samples are: `samples`, `num_val_samples` and `vocab_size`. The rest is here.

    Args:
        seq_len: positions that the model predicts in one sequence.
        batch_size: sequences in one forward pass over all ranks together.
        val_batches, num_workers, seed: see EndlessDataModule.

    Attributes:
        source_names: where samples come from, if from several sources; a batch's "source" counts in this list.

    Raises:
        ConfigError: a value out of range.
    """

    source_names: tuple[str, ...] = ()

    def __init__(self, seq_len: int, batch_size: int, val_batches: int, num_workers: int, seed: int) -> None:
        require(seq_len >= 1, "data.seq_len", seq_len, "an integer >= 1")
        require_at_most(MAX_SEQ_LEN, "data.seq_len", seq_len)
        super().__init__(batch_size, val_batches, num_workers, seed)
        require_at_most(max(1, MAX_BATCH_TOKENS // seq_len), "data.batch_size", batch_size)
        self.seq_len = seq_len

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of tokens; known before `prepare_data`."""

    @property
    def tokenizer(self) -> Tokenizer:
        return NumberTokenizer(self.vocab_size)

    @property
    def encoding(self) -> dict[str, Any]:
        tokenizer = self.tokenizer
        return {"tokens": Vocabulary(tokenizer.name, getattr(tokenizer, "content", None), self.vocab_size)}

    def check_source(self, source: str) -> None:
        check_tokenizer(source, self.tokenizer)

    @property
    def tokens_per_batch(self) -> int:
        """Positions predicted in one global batch."""
        return self.batch_size * self.seq_len

    @property
    def stream_identity(self) -> dict[str, Any]:
        return {"seq_len": self.seq_len, **super().stream_identity}
