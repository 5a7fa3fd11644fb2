"""Means over many batches, summed in fp32 or wider whatever precision the model is cast to."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class WideMetric(Metric):
    """A metric whose states are never made narrower than they were declared.

    A metric that is a submodule is cast with its module. In bfloat16 a sum of losses stops growing after a few hundred
    batches, because the next loss is less than half of its last bit; in float16 it overflows at 65504. Moving to
    another device, and casting to a wider type, work as usual.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        def widened(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if _bits(moved) >= _bits(tensor) else tensor.to(moved.device)

        return super()._apply(widened, exclude_state)


def _bits(tensor: Tensor) -> int:
    return torch.finfo(tensor.dtype).bits if tensor.is_floating_point() else 0


class WeightedMean(WideMetric):
    """The weighted mean of scalars since the last reset, over all processes.

    A NaN among the values makes the mean NaN: torchmetrics' MeanMetric leaves it out by default, so that a run that
    diverged would look as if it had not, and waits for the device twice an update to look for one.
    """

    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in ("total", "weight"):
            self.add_state(state, torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")

    def update(self, value: Tensor, weight: float = 1.0) -> None:
        """Add a scalar `value`, which counts `weight` times."""
        self.total = self.total + value.to(self.total.dtype) * weight
        self.weight = self.weight + weight

    def compute(self) -> Tensor:
        """Return the mean, a scalar; NaN where nothing was added."""
        return self.total / self.weight
