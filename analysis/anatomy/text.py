"""The held-out text that every model is measured on: its sequences, and which document each token is of."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from core.errors import require

Sums = npt.NDArray[np.float64]


class Batch(NamedTuple):
    """Sequences that go through a model side by side, on the CPU.

    Attributes:
        inputs: token ids, int64 [batch, seq].
        targets: the token that follows each, int64 [batch, seq].
        positions: of each input in its document, int64 [batch, seq], where attention does not cross documents; else
            None.
        documents: of each target, int64 [batch, seq], counted from 0 over the whole text.
    """

    inputs: Tensor
    targets: Tensor
    positions: Tensor | None
    documents: Tensor


@dataclass(frozen=True)
class Text:
    """Hands out the batches of a held-out text, in an order that is always the same, as often as it is gone through.

    Attributes:
        batches: all of them.
        tokenizer: a datamodules.tokenizers.Tokenizer, which says what the ids stand for.
        fitting: batches of the training split, for measures that fit something before they measure.
        watch: called after each batch; a bar is drawn with it.
    """

    batches: tuple[Batch, ...]
    tokenizer: Any
    fitting: tuple[Batch, ...] = ()
    watch: Callable[[], None] = lambda: None

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield batch
            self.watch()

    @property
    def num_documents(self) -> int:
        """Number of documents of which there is a part."""
        return 1 + max(int(batch.documents.max()) for batch in self.batches)

    @property
    def num_tokens(self) -> int:
        """Number of predicted tokens."""
        return sum(batch.targets.numel() for batch in self.batches)

    @property
    def tokens_by_document(self) -> Sums:
        """Number of predicted tokens of each document, [documents]."""
        tally = Tally(self, 1)
        for batch in self.batches:
            tally.add(0, batch, torch.ones(batch.targets.shape))
        return np.asarray(tally.sums[0])

    def beginning(self, sequences: int) -> Batch:
        """Return so many sequences of the whole text side by side, or all where there are fewer: in any batches."""
        batches = self.batches[:sequences]
        known = [batch.positions for batch in batches if batch.positions is not None]
        return Batch(
            torch.cat([batch.inputs for batch in batches])[:sequences],
            torch.cat([batch.targets for batch in batches])[:sequences],
            torch.cat(known)[:sequences] if known else None,
            torch.cat([batch.documents for batch in batches])[:sequences],
        )

    def watched(self, watch: Callable[[], None]) -> "Text":
        """Return the same text, which calls `watch` after each batch."""
        return replace(self, watch=watch)


class Tally:
    """Adds up quantities of tokens by the document that they are of.

    Args:
        text: whose documents.
        rows: how many quantities.

    Attributes:
        sums: float64 [rows, documents].
    """

    def __init__(self, text: Text, rows: int) -> None:
        self.sums: Sums = np.zeros((rows, text.num_documents))

    def add(self, row: int, batch: Batch, values: Tensor) -> None:
        """Add a quantity's values [batch, seq], one for each predicted token."""
        flat = values.detach().flatten().double().cpu().numpy()
        np.add.at(self.sums[row], batch.documents.flatten().numpy(), flat)


def held_out(datamodule: Any, num_tokens: int, batch_size: int | None = None, fitting_tokens: int = 0) -> Text:
    """Return the first sequences of a DataModule's validation sample.

    Args:
        datamodule: a StreamDataModule whose data are prepared.
        num_tokens: at least so many predicted tokens, in whole sequences; all that there are if they are fewer.
        batch_size: sequences side by side; None: as many as in training.
        fitting_tokens: so many of the training split beside them.

    Raises:
        ConfigError: there is no sequence, or a size is less than 1.
    """
    require(num_tokens >= 1, "tokens", num_tokens, "an integer >= 1")
    kind = type(datamodule).__name__
    require(hasattr(datamodule, "tokenizer"), "data._target_", kind, "data of text, which the instruments read")
    batch_size = datamodule.batch_size if batch_size is None else batch_size
    require(batch_size >= 1, "batch_size", batch_size, "an integer >= 1")
    most = datamodule.num_val_samples
    require(most >= 1, "data.seq_len", datamodule.seq_len, "a length of which the validation split has one sequence")
    count, fitted = (-(-number // datamodule.seq_len) for number in (num_tokens, fitting_tokens))
    batches = _read(datamodule.samples("val"), min(most, count), batch_size)
    fitting = _read(datamodule.samples("train"), fitted, batch_size) if fitted else ()
    return Text(batches, datamodule.tokenizer, fitting)


def _read(samples: Any, count: int, batch_size: int) -> tuple[Batch, ...]:
    """Return the first sequences of some samples, with documents counted as they come."""
    known: dict[int, int] = {}
    batches = []
    for first in range(0, count, batch_size):
        numbers = np.arange(first, min(first + batch_size, count))
        rows = samples.read(numbers)
        tokens = torch.from_numpy(rows["tokens"])
        named = _documents(samples, numbers, tokens.size(1) - 1)
        counted = [known.setdefault(name, len(known)) for name in named.ravel().tolist()]
        documents = torch.tensor(counted).view(named.shape)
        positions = torch.from_numpy(rows["positions"]) if "positions" in rows else None
        batches.append(Batch(tokens[:, :-1], tokens[:, 1:], positions, documents))
    return tuple(batches)


def _documents(samples: Any, numbers: npt.NDArray[np.int64], seq_len: int) -> npt.NDArray[np.int64]:
    """Return a name for each predicted token's document, [samples, seq_len]; data without documents have sequences."""
    if hasattr(samples, "documents"):
        return np.asarray(samples.documents(numbers))
    return np.repeat(numbers[:, None], seq_len, axis=1)
