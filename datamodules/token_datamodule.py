"""The DataModule of a prepared corpus: shuffled training stream, fixed validation sample, exact resumption."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from core.errors import require
from datamodules.bigram import MAX_VOCABULARY, bigram_loss
from datamodules.shards import Split, open_split
from datamodules.stream import TokenStream
from datamodules.tokenizers import ByteTokenizer

VALIDATION_SEED = 0  # the validation sample does not change with the run's seed


class TokenDataModule(L.LightningDataModule):
    """Subclasses say where the corpus lies (`folder`) and how it comes there (`prepare_data`).

    The position in the stream is one integer, the number of samples consumed by all ranks, and belongs to this
    object's `state_dict`: it follows from the optimizer step, so prefetched batches cannot falsify it.

    Args:
        seq_len: positions that the model predicts in one sequence.
        batch_size: sequences in one forward pass over all ranks together.
        val_batches: at most so many batches are drawn, once, for validation.
        num_workers: data-loader processes; the reader is faster than they are, 0 is right unless the step starves.
        seed: of the training order.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(self, seq_len: int, batch_size: int, val_batches: int, num_workers: int, seed: int) -> None:
        super().__init__()
        for name, value, least in (
            ("seq_len", seq_len, 1),
            ("batch_size", batch_size, 1),
            ("val_batches", val_batches, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            require(value >= least, f"data.{name}", value, f"an integer >= {least}")
        self.seq_len, self.batch_size, self.val_batches = seq_len, batch_size, val_batches
        self.num_workers, self.seed = num_workers, seed
        self.tokenizer = ByteTokenizer()
        self._first_sample, self._first_step = 0, 0

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Where the prepared corpus lies."""

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def tokens_per_batch(self) -> int:
        """Positions predicted in one global batch."""
        return self.batch_size * self.seq_len

    def check(self) -> None:
        """Hold the prepared corpus against the configuration.

        Raises:
            ConfigError: a split is too short for one sequence, or for one batch.
            CorpusError: the corpus is damaged.
        """
        for name in ("train", "val"):
            split = open_split(self.folder, name)
            most = split.num_tokens - 1
            require(
                self.seq_len <= most, "data.seq_len", self.seq_len, f"at most {most}, the {name} split's tokens - 1"
            )
            samples = split.num_samples(self.seq_len)
            require(
                self.batch_size <= samples, "data.batch_size", self.batch_size, f"at most {samples}: {name} samples"
            )

    def _stream(self, name: str, **position: Any) -> TokenStream:
        world_size = self.trainer.world_size if self.trainer else 1
        valid = f"a multiple of the number of processes, {world_size}"
        require(self.batch_size % world_size == 0, "data.batch_size", self.batch_size, valid)
        rank = self.trainer.global_rank if self.trainer else 0
        split = open_split(self.folder, name)
        return TokenStream(split, self.seq_len, self.batch_size, rank=rank, world_size=world_size, **position)

    def _loader(self, stream: TokenStream) -> DataLoader[dict[str, Tensor]]:
        pinned = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        # A generator of its own: a loader draws a seed for its workers, and one more validation must not shift torch's.
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(stream, batch_size=None, num_workers=self.num_workers, pin_memory=pinned, generator=generator)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        if self.trainer:
            self._first_sample, self._first_step = self.state_dict()["samples"], self.trainer.global_step
        return self._loader(self._stream("train", seed=self.seed, first_sample=self._first_sample))

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._loader(self._stream("val", seed=VALIDATION_SEED, num_batches=self._num_val_batches))

    @property
    def _num_val_batches(self) -> int:
        return min(self.val_batches, open_split(self.folder, "val").num_samples(self.seq_len) // self.batch_size)

    @property
    def stream_identity(self) -> dict[str, Any]:
        """The settings without which a position in the stream means nothing: a run is resumed under the same."""
        return {"seq_len": self.seq_len, "seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        """{"samples": consumed by all ranks, "step": at which, "stream_identity"}.

        A half-accumulated step is not in the weights, so it is not counted.
        """
        assert self.trainer is not None
        steps = self.trainer.global_step - self._first_step
        consumed = steps * self.trainer.accumulate_grad_batches * self.batch_size
        samples = self._first_sample + consumed
        return {"samples": samples, "step": self.trainer.global_step, "stream_identity": self.stream_identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning calls this before it restores the step; train_dataloader, which comes after, needs both.
        self._first_sample, self._first_step = state_dict["samples"], state_dict["step"]

    def bits_per_byte(self, loss: float) -> float:
        """Nats per token of the validation split -> bits per byte of its text."""
        split: Split = open_split(self.folder, "val")
        return loss / np.log(2) * split.num_tokens / split.num_bytes

    def baseline_loss(self) -> float | None:
        """A bigram model's validation loss in nats per token; None where the vocabulary is too large for one."""
        if self.vocab_size > MAX_VOCABULARY:
            return None
        stream = TokenStream(open_split(self.folder, "val"), self.seq_len, self.batch_size, VALIDATION_SEED)
        samples: npt.NDArray[np.int64] = np.concatenate([stream.read(n) for n in range(self._num_val_batches)])
        return bigram_loss(open_split(self.folder, "train").tokens, samples, self.vocab_size)
