"""A corpus that `python -m tools.prepare` made."""

from collections.abc import Sequence
from copy import copy
from functools import cached_property
from pathlib import Path

from core.errors import require
from datamodules.remote import open_storage
from datamodules.shard_cache import ShardCache
from datamodules.shards import Split
from datamodules.storage import LocalFolder, Storage
from datamodules.token_datamodule import TokenDataModule
from datamodules.tokenizers import Tokenizer, read_tokenizer


class ShardCorpus(TokenDataModule):
    """Trains on the shards of one folder, here or elsewhere (data=shards).

    Args:
        path: the folder with the corpus' index.json; or its address: s3://, gs://, hf://, https://.
        seq_len, batch_size, val_batches, num_workers, seed: see StreamDataModule.
        document_mask, shuffle_block: see TokenDataModule.
        cache_dir: where shards from elsewhere are kept.
        cache_gb: how much of them, in 10^9 bytes.
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
        cache_dir: str = "data/cache",
        cache_gb: float = 50.0,
    ) -> None:
        super().__init__(seq_len, batch_size, val_batches, num_workers, seed, document_mask, shuffle_block)
        require(0 < cache_gb < 1e9, "data.cache_gb", cache_gb, "a number in (0, 1e9)")
        self.path, self.cache_gb, self.cache = path, cache_gb, ShardCache(Path(cache_dir), int(cache_gb * 1e9))
        self.save_hyperparameters()

    @property
    def folder(self) -> Path:
        return Path(self.path)

    @cached_property
    def storage(self) -> Storage:
        return open_storage(self.path, self.cache)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.storage, self.index)

    @property
    def vocab_size(self) -> int:
        return self.index.vocab_size

    def split(self, name: str) -> Split:
        return Split(copy(self.storage), self.index, name)  # each keeps shards of its own

    def bytes_in_use(self) -> int:
        """Return how many bytes have to be in the cache at the same time; 0: none.

        That is the validation split, the checksums, and of the training split the block that is read, the one that is
        fetched ahead, one more for ranks and workers that are a block ahead of others, and a shard for the baseline.
        """
        if isinstance(self.storage, LocalFolder):
            return 0
        splits = [self.index.splits[name] for name in ("train", "val")]
        train, val = ([shard.num_bytes(self.index.dtype) for shard in split.shards] for split in splits)
        num_shards = len(train)
        if self.shuffle_block is not None:
            num_shards = 3 * (-(-self.shuffle_block * self.seq_len // self.index.shard_tokens) + 1) + 1
        return sum(val) + sum(train[:num_shards]) + sum(split.checksums.num_bytes("uint32") for split in splits)

    def check(self) -> None:
        """Refuse what TokenDataModule does, and a cache that is too small.

        Raises:
            ConfigError: also, the cache is too small.
        """
        super().check()
        require_room([self])


def require_room(corpora: Sequence[ShardCorpus]) -> None:
    """Raise ConfigError unless their cache has room for what they use at the same time."""
    needed, first = sum(corpus.bytes_in_use() for corpus in corpora), corpora[0]
    block = max(first.batch_size, *(corpus.index.shard_tokens // corpus.seq_len for corpus in corpora))
    valid = f"{needed / 1e9:.3g}, for shards in use at the same time; fewer are with data.shuffle_block={block}"
    require(needed <= first.cache.limit, "data.cache_gb", first.cache_gb, f"at least {valid}")
