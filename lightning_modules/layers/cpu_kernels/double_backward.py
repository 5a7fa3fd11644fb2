"""Gradients that are differentiated once more, for backward passes that are written by hand."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differentiable_gradients(
    function: Callable[..., Tensor], operands: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of function(*operands), made of operators that have gradients of every order themselves.

    A backward pass by hand calls it where its own results will be differentiated: sharpness, gradient penalties.

    Args:
        function: in operators of torch.
        operands: its arguments.
        needed: which of them have a gradient.
        grad: that of the result.
    """
    # Of views, as an operand may depend on another one, whose gradient would then be in its own already.
    operands = [operand.view_as(operand) for operand in operands]
    wanted = [operand for operand, need in zip(operands, needed, strict=True) if need]
    made = iter(torch.autograd.grad(function(*operands), wanted, grad, create_graph=True))
    return tuple(next(made) if need else None for need in needed)
