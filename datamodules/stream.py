"""An endless, stateless stream of batches: batch n is the same tokens at any number of ranks and workers."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from datamodules.order import sample_indices
from datamodules.shards import Split


class TokenStream(IterableDataset[dict[str, Tensor]]):
    """Yields {"tokens": int64 [batch_size / world_size, seq_len + 1]}, this rank's part of each global batch.

    Args:
        split: the tokens.
        seq_len: positions that the model predicts.
        batch_size: sequences in a global batch, a multiple of world_size.
        seed: of the order; each epoch is shuffled anew.
        first_sample: number of samples already consumed, over all ranks.
        num_batches: where to end; None: never.
        rank: which part of the global batch.
        world_size: in how many parts.
    """

    def __init__(
        self,
        split: Split,
        seq_len: int,
        batch_size: int,
        seed: int,
        first_sample: int = 0,
        num_batches: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.split, self.seq_len, self.batch_size, self.seed = split, seq_len, batch_size, seed
        self.first_sample, self.num_batches, self.rank, self.world_size = first_sample, num_batches, rank, world_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        # The loader asks its workers in turn, so worker w of W holds batches w, w + W, ...
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        batches = itertools.count(start, step) if self.num_batches is None else range(start, self.num_batches, step)
        for batch in batches:
            yield {"tokens": torch.from_numpy(self.read(batch))}

    def read(self, batch: int) -> np.ndarray:
        """This rank's windows of the given batch, [batch_size / world_size, seq_len + 1]."""
        share = self.batch_size // self.world_size
        first = self.first_sample + batch * self.batch_size + self.rank * share
        numbers = np.arange(first, first + share, dtype=np.int64)
        return self.split.read(sample_indices(numbers, self.split.num_samples(self.seq_len), self.seed), self.seq_len)
