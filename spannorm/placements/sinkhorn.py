"""Sinkhorn and Knopp's way (1967) to a doubly stochastic matrix: every row and every column has the sum 1."""

import re
from typing import Any

import torch
from torch import Tensor


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Return exp(logits) with its columns divided by their sums, then its rows, so many times.

    Rows come last, so their sums are exactly 1; those of the columns come near. Only the logits are kept for the
    backward pass, which computes the iterations once more. For torch.compile it is one operator: a kernel of so many
    steps would be minutes in the making.

    Args:
        logits: matrices [n, n, ...], rows by columns; the last dimensions tell the matrices apart.
        iterations: how often columns and rows are divided; at least 1.
    """
    found: Tensor = _sinkhorn(logits, iterations)
    return found


def _divide_in_turn(logits: Tensor, iterations: int) -> tuple[Tensor, list[tuple[Tensor, Tensor, int]]]:
    """Return the matrices, and of each division its result, its divisor and the dimension of the sums."""
    # A factor on a column does not outlive the first division, so that no exponent need be above 0.
    matrices = (logits - logits.amax(0, keepdim=True)).exp()
    tiny, steps = torch.finfo(logits.dtype).tiny, []
    for _ in range(iterations):
        for dim in (0, 1):
            sums = matrices.sum(dim, keepdim=True).clamp_min(tiny)  # a row that underflowed stays 0
            matrices = matrices / sums
            steps.append((matrices, sums, dim))
    return matrices, steps


def _sinkhorn_backward(grad: Tensor, logits: Tensor, iterations: int) -> Tensor:
    for result, sums, dim in reversed(_divide_in_turn(logits, iterations)[1]):
        grad = (grad - (grad * result).sum(dim, keepdim=True)) / sums
    return (grad * (logits - logits.amax(0, keepdim=True)).exp()).contiguous()


def _doubly_stochastic(logits: Tensor, iterations: int) -> Tensor:
    return _divide_in_turn(logits, iterations)[0].contiguous()


SINKHORN_OPS = re.sub(r"\W", "_", __name__)  # a copy of this file has operators of its own
_sinkhorn = torch.library.custom_op(f"{SINKHORN_OPS}::sinkhorn", _doubly_stochastic, mutates_args=())
_sinkhorn_gradient = torch.library.custom_op(f"{SINKHORN_OPS}::sinkhorn_gradient", _sinkhorn_backward, mutates_args=())
_sinkhorn.register_fake(lambda logits, iterations: logits.new_empty(logits.shape))
_sinkhorn_gradient.register_fake(lambda grad, logits, iterations: logits.new_empty(logits.shape))


def _sinkhorn_save(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    logits, ctx.iterations = inputs
    ctx.save_for_backward(logits)


def _sinkhorn_vjp(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (logits,) = ctx.saved_tensors
    # The operator has no gradient itself, which may be asked for.
    of_logits = _sinkhorn_backward if torch.is_grad_enabled() else _sinkhorn_gradient
    return of_logits(grad, logits, ctx.iterations), None


_sinkhorn.register_autograd(_sinkhorn_vjp, setup_context=_sinkhorn_save)
