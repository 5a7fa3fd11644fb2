"""How large a batch is worth its tokens: the gradient noise scale (1812.06162)."""

from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from callbacks.statistics import carry

CARRIED = "noise_scale"
DECAY = 0.95  # of the moving averages, a logged step


class NoiseScale:
    """B = tr(S) / |G|^2, from the squared gradient norms of a small and a large batch (1812.06162, appendix A.1).

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
        """In sequences; None as long as noise hides the gradient."""
        return self.noise / self.signal if self.signal > 0 else None


class PartialGradient:
    """Sees the gradient of a part of the step: the first of the accumulated batches, or that of each process.

    Not under FSDP, where neither is ever held, nor with a loss that is scaled for fp16.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self.possible, self.hooked, self.wanted = False, False, False
        self.square: Tensor | None = None
        distributed = trainer.world_size > 1
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        if trainer.accumulate_grad_batches > 1:
            self.possible = not distributed or isinstance(trainer.strategy, DDPStrategy)
        elif distributed and isinstance(trainer.strategy, DDPStrategy):
            model: Any = trainer.strategy.model
            model.register_comm_hook(None, self._reduce)
            self.possible = self.hooked = True

    def _reduce(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """What DDP does without a hook, to the bit, after a look at this process' own gradient."""
        buffer = bucket.buffer()
        if self.wanted:
            square = buffer.float().square().sum()
            self.square = square if self.square is None else self.square + square
        future = dist.all_reduce(buffer.mul_(1 / dist.get_world_size()), async_op=True).get_future()
        return future.then(lambda reduced: reduced.value()[0])

    def carry(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After the backward pass of the step's first batch: its squared norm, the mean over processes."""
        if not self.hooked:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            # Lightning has divided the loss by the number of batches.
            norm = torch.nn.utils.get_total_norm(gradients) * trainer.accumulate_grad_batches
            self.square = norm.square()
        if self.square is not None:
            carry(pl_module, CARRIED, trainer.strategy.reduce(self.square, reduce_op="mean").view(1))
        self.square = None
