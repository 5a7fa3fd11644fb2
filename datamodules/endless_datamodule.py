"""The base of all DataModules here: an endless, stateless stream, shared over ranks and workers, resumed exactly."""

from abc import abstractmethod
from typing import Any

import lightning as L
import torch

from core.errors import require
from core.limits import require_at_most
from core.parallel import data_part, num_data_parts
from core.steps import begin_step, num_batches
from datamodules.samples import Samples
from datamodules.stream import SampleStream, StreamLoader

MAX_BATCH_SIZE, MAX_WORKERS = 2**20, 1024


class EndlessDataModule(L.LightningDataModule):
    """Subclasses say what the samples are: `samples`, `num_val_samples`, and what the model has to know of them.

    The position in the stream is one integer, the number of samples consumed by all ranks, and belongs to this
    object's `state_dict`: it follows from the optimizer step, so prefetched batches cannot falsify it.

    Args:
        batch_size: samples in one forward pass over all ranks together.
        val_batches: at most so many batches are drawn, once, for validation.
        num_workers: data-loader processes; where the reader is faster than they are, 0 is right.
        seed: of the training order.

    Attributes:
        endless: the training data have no length; an epoch is what trainer.limit_train_batches says.

    Raises:
        ConfigError: a value out of range.
    """

    endless = True

    def __init__(self, batch_size: int, val_batches: int, num_workers: int, seed: int) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("val_batches", val_batches, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            require(value >= least, f"data.{name}", value, f"an integer >= {least}")
        require_at_most(MAX_BATCH_SIZE, "data.batch_size", batch_size)
        require_at_most(MAX_WORKERS, "data.num_workers", num_workers)
        self.batch_size, self.val_batches = batch_size, val_batches
        self.num_workers, self.seed = num_workers, seed
        self._first_sample, self._first_step = 0, 0

    @abstractmethod
    def samples(self, split: str) -> Samples:
        """Return those of train or val; the order of the latter does not depend on the run's seed."""

    @property
    @abstractmethod
    def num_val_samples(self) -> int:
        """Return how many samples there are to validate on."""

    def check(self) -> None:
        """Hold the prepared data against the configuration, before anything is written.

        Raises:
            ConfigError: a value that the data cannot serve.
            CorpusError: the data is damaged.
        """

    def check_source(self, source: str) -> None:
        """Hold the data against those of a model whose weights a run is to start from.

        Raises:
            ConfigError: they mean something else by what they have in common.
        """

    @property
    def encoding(self) -> dict[str, Any]:
        """Return what numbers in a batch stand for, by name; where two agree on it, a model of one reads the other."""
        return {}

    def check_trained_on(self, identity: dict[str, Any]) -> None:
        """Hold the data against those of a trained model whose answers they are to be laid beside.

        Args:
            identity: the `stream_identity` of the data that the model was trained on; empty: not known.

        Raises:
            ConfigError: the model's answers mean something else than these data say.
        """

    @property
    def num_val_batches(self) -> int:
        return min(self.val_batches, self.num_val_samples // self.batch_size)

    def _loader(self, split: str, **position: Any) -> StreamLoader:
        part, parts = (data_part(self.trainer), num_data_parts(self.trainer)) if self.trainer else (0, 1)
        valid = f"a multiple of the number of data-parallel processes, {parts}"
        require(self.batch_size % parts == 0, "data.batch_size", self.batch_size, valid)
        stream = SampleStream(self.samples(split), self.batch_size, rank=part, world_size=parts, **position)
        pinned = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        # A generator of its own: a loader draws a seed for its workers, and one more validation must not shift torch's.
        generator = torch.Generator().manual_seed(self.seed)
        workers = self.num_workers
        loader = StreamLoader(stream, batch_size=None, num_workers=workers, pin_memory=pinned, generator=generator)
        if split == "train" and self.trainer:
            # A Trainer of one's own may go through several epochs: each goes on where the one before has ended.
            loader.position = lambda: self.state_dict()["samples"]
        return loader

    def train_dataloader(self) -> StreamLoader:
        if self.trainer:
            self._first_sample, self._first_step = self.state_dict()["samples"], self.trainer.global_step
            begin_step(self.trainer)  # which that sample is the first of
        return self._loader("train", first_sample=self._first_sample)

    def val_dataloader(self) -> StreamLoader:
        return self._loader("val", num_batches=self.num_val_batches)

    def test_dataloader(self) -> StreamLoader:
        """Return the batches of validation: a corpus has no third split. One of your own may override this."""
        return self.val_dataloader()

    def predict_dataloader(self) -> StreamLoader:
        """Return the batches of `test_dataloader`."""
        return self.test_dataloader()

    @property
    def stream_identity(self) -> dict[str, Any]:
        """The settings without which a position in the stream means nothing: a run is resumed under the same."""
        return {"seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        """Return {"samples": consumed by all ranks, "step": at which, "stream_identity"}.

        A half-accumulated step is not in the weights, so it is not counted.
        """
        assert self.trainer is not None
        step = self.trainer.global_step
        consumed = num_batches(self.trainer, step) - num_batches(self.trainer, self._first_step)
        samples = self._first_sample + consumed * self.batch_size
        return {"samples": samples, "step": self.trainer.global_step, "stream_identity": self.stream_identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning calls this before it restores the step; train_dataloader, which comes after, needs both.
        self._first_sample, self._first_step = state_dict["samples"], state_dict["step"]

    def bits_per_byte(self, loss: float) -> float | None:
        """Return the bits per byte of the validation text, of nats per token; None: there is no text."""
        return None

    def baseline_loss(self) -> float | None:
        """Return a bigram model's validation loss in nats per token; None where there is none."""
        return None

    def unigram_loss(self) -> float | None:
        """Return the validation loss, in nats, of the frequencies of what is predicted; None: not counted."""
        return None
