"""Sinkhorn and Knopp's way (1967) to a doubly stochastic matrix: every row and every column has the sum 1."""

import re
from typing import Any

import torch
from torch import Tensor


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Return exp(logits) with its columns divided by their sums, then its rows, so many times.

    Rows come last, so their sums are 1; those of the columns come near. Only the logits are kept for the backward pass,
    which computes the iterations once more. For torch.compile it is one operator: a kernel of so many steps would be
    minutes in the making.

    Args:
        logits: matrices [n, n, ...], rows by columns; the last dimensions tell the matrices apart.
        iterations: how often columns and rows are divided; at least 1.
    """
    found: Tensor = _sinkhorn(logits, iterations)
    return found


def _factors_in_turn(logits: Tensor, iterations: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return exp(logits), but for a factor of each column, and by iteration the factors of rows and columns.

    The matrices are rows x exp x columns at any time, so that an iteration has to change the factors alone.
    """
    # A factor on a column does not outlive the first division, so that no exponent need be above 0.
    exp = (logits - logits.amax(0, keepdim=True)).exp()
    floor = torch.finfo(exp.dtype).tiny ** 0.5  # a row that underflowed stays 0; its factor's square is finite
    rows, factors = torch.ones_like(exp[:, :1]), []
    for _ in range(iterations):
        columns = (exp * rows).sum(0, keepdim=True).clamp_min(floor).reciprocal()
        rows = (exp * columns).sum(1, keepdim=True).clamp_min(floor).reciprocal()
        factors.append((rows, columns))
    return exp, factors


def _doubly_stochastic(logits: Tensor, iterations: int) -> Tensor:
    exp, factors = _factors_in_turn(logits, iterations)
    rows, columns = factors[-1]
    return (exp * rows * columns).contiguous()


def _sinkhorn_backward(grad: Tensor, logits: Tensor, iterations: int) -> Tensor:
    exp, factors = _factors_in_turn(logits, iterations)
    rows, columns = factors[-1]
    of_exp = grad * rows * columns
    of_rows, of_columns = (grad * exp * columns).sum(1, keepdim=True), (grad * exp * rows).sum(0, keepdim=True)
    before = [torch.ones_like(rows), *(factor for factor, _ in factors)]
    for rows_before, (rows, columns) in zip(reversed(before[:-1]), reversed(factors), strict=True):
        of_sums = of_rows * -rows.square()
        of_exp.addcmul_(of_sums, columns)
        of_columns = of_columns + (exp * of_sums).sum(0, keepdim=True)
        of_sums = of_columns * -columns.square()
        of_exp.addcmul_(of_sums, rows_before)
        of_rows, of_columns = (exp * of_sums).sum(1, keepdim=True), torch.zeros_like(columns)
    return (of_exp * exp).contiguous()


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
