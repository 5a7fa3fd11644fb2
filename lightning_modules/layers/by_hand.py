"""Forward and backward passes written by hand, for steps of a CPU that no compiler fuses.

There a tensor of activations is larger than the processor's cache, so that each elementwise operator costs a pass over
memory, and each of its operands that autograd keeps costs room until the backward pass.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def pays(x: Tensor) -> bool:
    """Whether x is computed eagerly on a CPU in a precision that needs no other one in between."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and not isinstance(x, DTensor)
    )


def gradients(
    function: Callable[..., Tensor], operands: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Of function(*operands), made of what has gradients of every order, for a backward pass that is differentiated.

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
