"""An endless, stateless stream of batches: batch n is the same tokens at any number of ranks and workers."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from core.errors import UserError
from core.signals import held_back, ignore_stop_signals
from datamodules.samples import Rows, Samples

Batch = dict[str, Tensor]

TOGETHER = 256
"""Samples read at once, unless they say otherwise: where tokens are costs the same for few numbers as for many."""


class SampleStream(IterableDataset[Batch | UserError]):
    """Yields this rank's part of each global batch, as {"tokens": int64 [batch_size / world_size, seq_len + 1], ...}.

    In a data-loader process it yields, last of all, what the user can mend, for StreamLoader to raise: raised there, it
    would come out of the loader as that process' traceback.

    Args:
        samples: says what a sample number stands for.
        batch_size: samples in a global batch, a multiple of world_size.
        first_sample: number of samples already consumed, over all ranks.
        num_batches: where to end; None: never.
        rank: which part of the global batch.
        world_size: in how many parts.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        first_sample: int = 0,
        num_batches: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.samples, self.batch_size = samples, batch_size
        self.first_sample, self.num_batches, self.rank, self.world_size = first_sample, num_batches, rank, world_size

    def __iter__(self) -> Iterator[Batch | UserError]:
        try:
            yield from self._batches()
        except UserError as error:
            if get_worker_info() is None:
                raise
            yield error

    def _batches(self) -> Iterator[Batch]:
        worker = get_worker_info()
        # The loader asks its workers in turn, so worker w of W holds batches w, w + W, ...
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        batches = itertools.count(start, step) if self.num_batches is None else range(start, self.num_batches, step)
        remaining, size, share = iter(batches), 1, self.batch_size // self.world_size
        most = max(1, getattr(self.samples, "together", TOGETHER) // share)
        block = getattr(self.samples, "block", None)
        if block is not None:  # not beyond the next block, which is all that is fetched ahead
            most = max(1, min(most, block // (self.batch_size * step)))
        while group := list(itertools.islice(remaining, size)):
            rows = self.read(*group)
            for first in range(0, len(group) * share, share):
                yield {name: _shared(torch.from_numpy(part[first : first + share])) for name, part in rows.items()}
            size = min(2 * size, most)  # one by one at first, so that a run begins at once

    def read(self, *batches: int) -> Rows:
        """Return this rank's rows of the given batches, one after the other, batch_size / world_size of each."""
        share = self.batch_size // self.world_size
        firsts = self.first_sample + np.array(batches, np.int64) * self.batch_size + self.rank * share
        return self.samples.read((firsts[:, None] + np.arange(share)).ravel())


class StreamLoader(DataLoader[Batch | UserError]):
    """Hands out the batches of a SampleStream; what stops a process of its own is raised here, in the batch's place.

    What asks the run to stop is for the training process: its data-loader processes go on, as the step needs them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.worker_init_fn = ignore_stop_signals
        self.position: Callable[[], int] | None = None  # the sample that an iterator begins at; None: the stream's own

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if self.position is not None:
            cast(SampleStream, self.dataset).first_sample = self.position()
        with held_back():
            batches = super().__iter__()
        try:
            for batch in batches:
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        finally:
            # The traceback of what is raised here would keep it, in a cycle; torch waits five seconds for each process
            # of one that is collected with a cycle, whose queue has no thread any more that tells the process to end.
            del batches


def _shared(tensor: Tensor) -> Tensor:
    """Return the tensor; in a data-loader process, moved to memory that it shares with the main one.

    torch would move it there from the thread that hands batches on. Where /dev/shm is full, that prints a traceback and
    drops the batch, and the main process waits for it without end.

    Raises:
        RuntimeError: there is no room; core.interruption says it in words.
    """
    return tensor if get_worker_info() is None else tensor.share_memory_()
