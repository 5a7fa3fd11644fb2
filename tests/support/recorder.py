"""A callback that records what the loggers are given."""

import math
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor

from tests.support.job import ACCUMULATE


class Recorder(L.Callback):
    """Computes losses and gradients of each batch once more, in float64 where it counts."""

    losses: ClassVar[list[float]] = []
    norms: ClassVar[list[float]] = []
    stepped: ClassVar[list[float]] = []  # norms of the gradients that the optimizer gets

    def on_fit_start(self, *_: Any) -> None:
        for recorded in (self.losses, self.norms, self.stepped):
            recorded.clear()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % ACCUMULATE == ACCUMULATE - 1:  # gradients are those of the step just taken
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            self.stepped.append(torch.nn.utils.get_total_norm(gradients).item())

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        tokens = batch["tokens"]
        logits = module.model(tokens[:, :-1])[0].double()
        loss = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean()
        self.losses.append(loss.item())
        if batch_idx % ACCUMULATE == 0:
            self.sums = [torch.zeros_like(p, dtype=torch.float64) for p in module.parameters()]
        gradients = torch.autograd.grad(loss / ACCUMULATE, list(module.parameters()), allow_unused=True)
        for total, gradient in zip(self.sums, gradients, strict=True):
            total += 0 if gradient is None else gradient
        if batch_idx % ACCUMULATE == ACCUMULATE - 1:
            self.norms.append(math.sqrt(sum((total**2).sum().item() for total in self.sums)))
