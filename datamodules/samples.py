"""A stream is made of a function from global sample numbers 0, 1, 2, ... to rows of a batch."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from datamodules.order import block_bounds, sample_indices
from datamodules.shards import Split

Numbers = npt.NDArray[np.int64]
LOOK_AHEAD = 1024  # samples whose shards are fetched in the order in which they are needed
Rows = dict[str, npt.NDArray[Any]]


class Samples(Protocol):
    """Stateless and endless; picklable, so that data-loader workers get one."""

    def read(self, numbers: Numbers) -> Rows:
        """Return samples by number: "tokens" int64 [samples, seq_len + 1], and what else the batch carries.

        Of images: "images" fp32 [samples, channels, height, width] and "labels" int64 [samples].
        """
        ...


class ShuffledSplit:
    """The windows of a split, each epoch in another order.

    Args:
        split: the tokens.
        seq_len: positions that the model predicts.
        seed: of the order.
        block: see datamodules.order.sample_indices.
        document_mask: adds "positions" int64 [samples, seq_len]: how far each input token is from the beginning of its
            document, or of the window. 0 is where a document begins, so this says too which tokens belong together.
    """

    def __init__(
        self, split: Split, seq_len: int, seed: int, block: int | None = None, document_mask: bool = False
    ) -> None:
        self.split, self.seq_len, self.seed, self.block, self.document_mask = split, seq_len, seed, block, document_mask
        self.num_samples = split.num_samples(seq_len)
        self._announced: tuple[int, int] | None = None

    def read(self, numbers: Numbers) -> Rows:
        self._announce(int(numbers[0]))
        indices = sample_indices(numbers, self.num_samples, self.seed, self.block)
        tokens = self.split.read(indices, self.seq_len)
        if not self.document_mask:
            return {"tokens": tokens}
        return {"tokens": tokens, "positions": positions(tokens[:, :-1], self.split.index.end_of_document)}

    def documents(self, numbers: Numbers) -> Numbers:
        """Return the document of each token that samples predict, [samples, seq_len]: the place of its first token.

        The token that ends a document belongs to it. Places count from the beginning of the split.
        """
        indices = sample_indices(numbers, self.num_samples, self.seed, self.block)
        ends = self.split.read(indices, self.seq_len) == self.split.index.end_of_document
        starts = indices * self.seq_len
        places = starts[:, None] + np.arange(self.seq_len + 1)
        begins = np.where(ends, places + 1, 0)
        begins[:, 0] = np.where(ends[:, 0], begins[:, 0], [self._beginning(start) for start in starts.tolist()])
        return np.asarray(np.maximum.accumulate(begins, axis=1)[:, :-1])

    def _beginning(self, place: int) -> int:
        """Return where the document begins that a token of the split belongs to."""
        stop, length = place, self.seq_len
        while stop > 0:
            start = max(0, stop - length)
            (ends,) = np.nonzero(self.split.slice(start, stop) == self.split.index.end_of_document)
            if len(ends):
                return int(start + ends[-1] + 1)
            stop, length = start, 2 * length
        return 0

    def _announce(self, number: int) -> None:
        """Have the storage fetch, at the beginning of a block, this one's shards, those of the next samples first, and
        then the next one's."""
        size = min(self.block or self.num_samples, self.num_samples)
        epoch, position = divmod(number, self.num_samples)
        here = epoch, position // size
        if here == self._announced:
            return
        self._announced = here
        following = min((position // size + 1) * size, self.num_samples) + epoch * self.num_samples
        blocks = [block_bounds(n, self.num_samples, self.seed, self.block) for n in (number, following)]
        soon = np.arange(number, min(number + LOOK_AHEAD, following))
        next_ones = [(index, 1) for index in sample_indices(soon, self.num_samples, self.seed, self.block).tolist()]
        self.split.keep([span for first, count in next_ones + blocks for span in self._token_ranges(first, count)])

    def _token_ranges(self, first: int, count: int) -> list[tuple[int, int]]:
        """Return ranges of tokens [start, stop) of samples [first, first + count), which go on at 0 after the last."""
        end = first + count
        pieces = [(first, min(end, self.num_samples)), (0, end - self.num_samples)]
        return [(start * self.seq_len, stop * self.seq_len + 1) for start, stop in pieces if start < stop]


def positions(tokens: Numbers, end_of_document: int) -> Numbers:
    """Return how many tokens of its document stand before each of tokens [samples, seq_len], of the same shape."""
    places = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    begins = np.zeros_like(tokens)
    begins[:, 1:] = np.where(tokens[:, :-1] == end_of_document, places[:, 1:], 0)
    return places - np.maximum.accumulate(begins, axis=1)
