"""What goes wrong in real runs, on purpose and at a known step: `+callbacks.fault._target_=...`."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class BadBatch(L.Callback):
    """From step `first` on, `num_steps` steps (counted from 1) see one random row of bytes in all sequences."""

    def __init__(self, first: int, num_steps: int = 1) -> None:
        self.steps = range(first, first + num_steps)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        step = trainer.global_step + 1
        if step in self.steps:
            generator = torch.Generator().manual_seed(step)
            batch["tokens"].copy_(torch.randint(256, (batch["tokens"].size(1),), generator=generator))


class NaNGradient(L.Callback):
    """At step `first` and the `num_steps - 1` after it, one entry of one gradient, on one rank, is no number."""

    def __init__(self, first: int, num_steps: int = 1, parameter: str = "blocks.0.attn.o_proj.weight") -> None:
        self.steps, self.parameter = range(first, first + num_steps), parameter

    def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step + 1 in self.steps and trainer.global_rank == trainer.world_size - 1:
            gradient: Any = module.model.get_parameter(self.parameter).grad  # type: ignore[union-attr, operator]
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).view(-1)[0] = torch.nan


class FlipBit(L.Callback):
    """Before step `step` a bit of a float32 weight is inverted, on all ranks; bit 30 is the exponent's highest."""

    def __init__(self, step: int, parameter: str, entry: int = 0, bit: int = 30) -> None:
        self.step, self.parameter, self.entry, self.bit = step, parameter, entry, bit

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step + 1 == self.step:
            weight: Any = module.model.get_parameter(self.parameter)  # type: ignore[union-attr, operator]
            weight.data.view(torch.int32).view(-1)[self.entry] ^= 1 << self.bit
