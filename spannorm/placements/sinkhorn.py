"""Sinkhorn and Knopp's way (1967) to a doubly stochastic matrix: every row and every column has the sum 1."""

from typing import Any

import torch
from torch import Tensor


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Return exp(logits) with its columns divided by their sums, then its rows, so many times.

    Rows come last, so their sums are exactly 1; those of the columns come near. Only the logits are kept for the
    backward pass, which computes the iterations once more.

    Args:
        logits: matrices [n, n, ...], rows by columns; the last dimensions tell the matrices apart.
        iterations: how often columns and rows are divided; at least 1.
    """
    return _Sinkhorn.apply(logits, iterations)


def _divide(logits: Tensor, iterations: int) -> tuple[Tensor, list[tuple[Tensor, Tensor, int]]]:
    """Return the matrices, and of each division its result, its divisor and the dimension of the sums."""
    # A factor on a column does not outlive the first division: the exponents are at most 0.
    matrices = (logits - logits.amax(0, keepdim=True)).exp()
    tiny, steps = torch.finfo(logits.dtype).tiny, []
    for _ in range(iterations):
        for dim in (0, 1):
            sums = matrices.sum(dim, keepdim=True).clamp_min(tiny)  # a row that underflowed stays 0
            matrices = matrices / sums
            steps.append((matrices, sums, dim))
    return matrices, steps


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.iterations = iterations
        return _divide(logits, iterations)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        _, steps = _divide(logits, ctx.iterations)
        for result, sums, dim in reversed(steps):
            grad = (grad - (grad * result).sum(dim, keepdim=True)) / sums
        return grad * (logits - logits.amax(0, keepdim=True)).exp(), None
