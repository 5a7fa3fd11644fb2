"""A corpus that `python -m tools.prepare` made."""

from functools import cached_property
from pathlib import Path

from datamodules.index import Index
from datamodules.shards import Split
from datamodules.storage import read_index
from datamodules.token_datamodule import TokenDataModule
from datamodules.tokenizers import Tokenizer, read_tokenizer


class ShardCorpus(TokenDataModule):
    """Trains on the shards of one folder (data=shards).

    Args:
        path: the folder with the corpus' index.json.
        seq_len, batch_size, val_batches, num_workers, seed: see StreamDataModule.
        document_mask, shuffle_block: see TokenDataModule.
    """

    def __init__(
        self,
        path: str,
        seq_len: int,
        batch_size: int,
        val_batches: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        document_mask: bool = False,
        shuffle_block: int | None = None,
    ) -> None:
        super().__init__(seq_len, batch_size, val_batches, num_workers, seed, document_mask, shuffle_block)
        self.path = path
        self.save_hyperparameters()

    @property
    def folder(self) -> Path:
        return Path(self.path)

    @cached_property
    def index(self) -> Index:
        return read_index(self.storage)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.storage, self.index)

    @property
    def vocab_size(self) -> int:
        return self.index.vocab_size

    def split(self, name: str) -> Split:
        return Split(self.storage, self.index, name)
