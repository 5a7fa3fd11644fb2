"""Gradient-preserving activation scaling (2506.22049): the stream shrinks on its way forward, its gradient does not."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GPAS(nn.Module):
    """x <- x - silu(g) stopgrad(x), g one learned number, 0 at the start, where it changes nothing.   2506.22049

    An option of several placements. As its authors' code has it, the two sublayers of a block share one g; it stands
    behind the addition where the stream goes on without a norm, and before it, on the skip alone, where a norm follows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., dim], scaled by 1 - silu(g), in its shape and dtype."""
        return x - (F.silu(self.gate) * x.detach()).to(x.dtype)


def make_gpas(wanted: bool) -> nn.Module:
    """Return GPAS, or what leaves the stream as it is."""
    return GPAS() if wanted else nn.Identity()
