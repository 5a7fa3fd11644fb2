"""The held-out data that every model is measured on: batches, what they ask for, and which document each part is of."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from core.errors import require
from core.task import OF_LANGUAGE, Task, task_of
from lightning_modules.trunk import Asked, Trunk

Sums = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Batch:
    """Samples that go through a model side by side, on the CPU.

    Attributes:
        rows: as a DataModule hands them out; what they are, models know (lightning_modules.trunk).
        documents: of each position, int64 [batch, positions], counted from 0 over all batches; each image is one.
        asked: what a model is asked for.
    """

    rows: dict[str, Tensor]
    documents: Tensor
    asked: Asked

    @classmethod
    def of(cls, model: Trunk, rows: dict[str, Tensor], documents: Tensor) -> Self:
        """Return the batch of these rows, as a model understands them.

        Args:
            model: any of its kind.
            rows: as above.
            documents: as above; or of each sample, int64 [batch, 1].
        """
        return cls(rows, documents.expand(-1, model.count(rows).positions), model.asked(rows))

    @classmethod
    def joined(cls, batches: Sequence["Batch"]) -> Self:
        """Return the samples of several batches side by side."""
        rows = {name: torch.cat([batch.rows[name] for batch in batches]) for name in batches[0].rows}
        asked = Asked(*(torch.cat(parts) for parts in zip(*(batch.asked for batch in batches), strict=True)))
        return cls(rows, torch.cat([batch.documents for batch in batches]), asked)

    @property
    def targets(self) -> Tensor:
        """Return what is to be predicted, int64 [batch, asked]."""
        return self.asked.targets

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return len(self.documents)

    @property
    def num_positions(self) -> int:
        """Number of positions of all samples together."""
        return self.documents.numel()

    @property
    def num_targets(self) -> int:
        """Number of targets of all samples together."""
        return self.targets.numel()

    @property
    def documents_of_targets(self) -> Tensor:
        """Return the document of each target, int64 [batch, asked]."""
        return self.documents.gather(1, self.asked.at)

    def seen_by(self, model: Trunk) -> Self:
        """Return the batch as another model of its kind sees it; a sample that it cuts otherwise is one document."""
        same = model.count(self.rows).positions == self.documents.size(1)
        return self if same else self.of(model, self.rows, self.documents[:, :1])

    def part(self, first: int, stop: int) -> Self:
        """Return the samples from one number up to another one."""
        here = slice(first, stop)
        rows = {name: values[here] for name, values in self.rows.items()}
        return replace(self, rows=rows, documents=self.documents[here], asked=Asked(*(x[here] for x in self.asked)))


@dataclass(frozen=True)
class HeldOut:
    """Hands out batches of held-out data, in an order that is always the same, as often as they are gone through.

    What is predicted and what is seen are counted apart: of a text each token is a target and a position, of an image
    there is one target, and a position of each patch.

    Attributes:
        batches: all of them.
        tokenizer: a datamodules.tokenizers.Tokenizer, which says what tokens stand for; None: there are no tokens.
        fitting: batches of the training split, for measures that fit something before they measure.
        task: what models are asked for.
        watch: called after each batch; a bar is drawn with it.
    """

    batches: tuple[Batch, ...]
    tokenizer: Any = None
    fitting: tuple[Batch, ...] = ()
    task: Task = OF_LANGUAGE
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
    def num_targets(self) -> int:
        """Number of targets: predicted tokens, or images."""
        return sum(batch.num_targets for batch in self.batches)

    @property
    def num_positions(self) -> int:
        """Number of positions that go through a model: tokens, or patches and class tokens."""
        return sum(batch.num_positions for batch in self.batches)

    @property
    def targets_by_document(self) -> Sums:
        """Number of targets of each document, [documents]."""
        return self._by_document(positions=False)

    @property
    def positions_by_document(self) -> Sums:
        """Number of positions of each document, [documents]."""
        return self._by_document(positions=True)

    def _by_document(self, positions: bool) -> Sums:
        tally = Tally(self, 1, positions)
        for batch in self.batches:
            tally.add(0, batch, torch.ones((batch.documents if positions else batch.asked.at).shape))
        return np.asarray(tally.sums[0])

    def beginning(self, samples: int) -> Batch:
        """Return so many samples side by side, from the first on, or all where there are fewer: in any batches."""
        return Batch.joined(self.batches[:samples]).part(0, samples)

    def seen_by(self, model: Trunk) -> "HeldOut":
        """Return the same data as another model of its kind sees them: of images it may make other patches."""

        def seen(batches: tuple[Batch, ...]) -> tuple[Batch, ...]:
            return tuple(batch.seen_by(model) for batch in batches)

        return replace(self, batches=seen(self.batches), fitting=seen(self.fitting))

    def watched(self, watch: Callable[[], None]) -> "HeldOut":
        """Return the same data, which call `watch` after each batch."""
        return replace(self, watch=watch)


class Tally:
    """Adds up quantities by the document that they are of.

    Args:
        data: whose documents.
        rows: how many quantities.
        positions: whether each position has a value; else each target has one.

    Attributes:
        sums: float64 [rows, documents].
    """

    def __init__(self, data: HeldOut, rows: int, positions: bool = False) -> None:
        self.sums: Sums = np.zeros((rows, data.num_documents))
        self.positions = positions

    def add(self, row: int, batch: Batch, values: Tensor) -> None:
        """Add a quantity's values, [batch, positions] or [batch, asked]."""
        documents = batch.documents if self.positions else batch.documents_of_targets
        flat = values.detach().flatten().double().cpu().numpy()
        np.add.at(self.sums[row], documents.flatten().numpy(), flat)


def has_blocks(model: Any) -> bool:
    """Return whether it is a model that instruments can look at: one of blocks that answers for its batches."""
    return isinstance(model, Trunk)


def held_out(
    datamodule: Any, module: Any, num_positions: int, batch_size: int | None = None, fitting_positions: int = 0
) -> HeldOut:
    """Return the first samples of a DataModule's validation split.

    Args:
        datamodule: an EndlessDataModule whose data are prepared.
        module: a LightningModule that is trained on such data, whose model says what they are; its weights do not
            matter.
        num_positions: at least so many, in whole samples; all that there are if they are fewer.
        batch_size: samples side by side; None: as many as in training.
        fitting_positions: so many of the training split beside them.

    Raises:
        ConfigError: there is no sample, or none that the model can read, or a size is less than 1.
    """
    require(num_positions >= 1, "tokens", num_positions, "an integer >= 1")
    model, kind = module.model, type(datamodule).__name__
    valid = "data whose samples can be asked for by number, as those of a datamodules.endless_datamodule"
    require(hasattr(datamodule, "samples"), "data._target_", kind, valid)
    batch_size = datamodule.batch_size if batch_size is None else batch_size
    require(batch_size >= 1, "batch_size", batch_size, "an integer >= 1")
    most = datamodule.num_val_samples
    require(most >= 1, "data", kind, "data with a whole sample to validate on")
    split = datamodule.samples("val")
    first = _rows(split, np.zeros(1, np.int64))
    require(model.can_read(first), "data._target_", kind, "data that the model can read")
    count, fitted = (-(-number // model.count(first).positions) for number in (num_positions, fitting_positions))
    batches = _read(model, split, min(most, count), batch_size)
    fitting = _read(model, datamodule.samples("train"), fitted, batch_size) if fitted else ()
    return HeldOut(batches, getattr(datamodule, "tokenizer", None), fitting, task_of(module))


def _read(model: Trunk, samples: Any, count: int, batch_size: int) -> tuple[Batch, ...]:
    """Return the first samples, with documents counted as they come."""
    known: dict[int, int] = {}
    batches = []
    for first in range(0, count, batch_size):
        numbers = np.arange(first, min(first + batch_size, count))
        named = _documents(samples, numbers)
        counted = [known.setdefault(name, len(known)) for name in named.ravel().tolist()]
        batches.append(Batch.of(model, _rows(samples, numbers), torch.tensor(counted).view(named.shape)))
    return tuple(batches)


def _rows(samples: Any, numbers: npt.NDArray[np.int64]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values) for name, values in samples.read(numbers).items()}


def _documents(samples: Any, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return a name for the document of each position; data without documents have samples, [samples, 1]."""
    if hasattr(samples, "documents"):
        return np.asarray(samples.documents(numbers))
    return numbers[:, None]
