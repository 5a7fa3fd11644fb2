"""Measures how large a batch is worth its tokens: the gradient noise scale (1812.06162)."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from callbacks.statistics import add_to_transfer

CARRIED = "noise_scale"
DECAY = 0.95  # of the moving averages, a logged step


class NoiseScale:
    """Estimates B = tr(S) / |G|^2 from squared gradient norms of a small and a large batch (1812.06162, appendix A.1).

    G is the true gradient and S the covariance of that of one sequence. Both are estimated without bias from each pair
    of norms, and averaged apart over steps: it is their ratio that would be biased.
    """

    def __init__(self) -> None:
        self.noise = self.signal = 0.0  # moving averages; starting from 0 scales both alike

    def update(self, small_square: float, small: int, large_square: float, large: int) -> None:
        """Add a step: squared gradient norms of a batch of `small` sequences and of one of `large`."""
        signal = (large * large_square - small * small_square) / (large - small)
        noise = (small_square - large_square) / (1 / small - 1 / large)
        self.signal = DECAY * self.signal + (1 - DECAY) * signal
        self.noise = DECAY * self.noise + (1 - DECAY) * noise

    @property
    def value(self) -> float | None:
        """Return the noise scale in sequences; None as long as one of the two is hidden by the other."""
        return self.noise / self.signal if self.signal > 0 and self.noise > 0 else None


class PartialGradient:
    """Sees the gradient of a part of the step: that of one process in the first of the accumulated batches.

    Not under FSDP, where a process never has it, nor with a loss that is scaled for fp16.

    Attributes:
        possible: whether a part is less than the step, and can be seen.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        unscaled = getattr(trainer.precision_plugin, "scaler", None) is None
        parts = trainer.accumulate_grad_batches * trainer.world_size
        self.possible = unscaled and parts > 1 and isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        self._squares: list[Tensor] = []
        self._handles: list[Any] = []

    def watch(self, pl_module: L.LightningModule) -> None:
        """Begin to watch, before the part's backward pass; a hook sees a gradient before DDP averages it."""
        for parameter in pl_module.parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._keep))

    def _keep(self, gradient: Tensor) -> None:
        self._squares.append(gradient.detach().float().square().sum())

    def carry(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Send the squared norm, mean over processes, along with the step's statistics; after the backward pass."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            # Lightning has divided the loss by the number of batches.
            square = torch.stack(self._squares).sum() * trainer.accumulate_grad_batches**2
            add_to_transfer(pl_module, CARRIED, trainer.strategy.reduce(square, reduce_op="mean").view(1))
        self._handles, self._squares = [], []
