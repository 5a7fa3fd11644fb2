"""silu(gate) * up, elementwise: what SwiGLU (2002.05202) has between its products."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.layers import by_hand


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    if by_hand.pays(gate):
        product: Tensor = _SwiGLU.apply(gate, up)
        return product
    return F.silu(gate) * up


def gradients(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Of silu(gate) * up, in gate and in up; they have none themselves."""
    return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class _SwiGLU(torch.autograd.Function):
    """Keeps what it is given; autograd keeps silu(gate) besides."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():
            return by_hand.gradients(lambda g, u: F.silu(g) * u, (gate, up), ctx.needs_input_grad, grad)
        return gradients(gate, up, grad)
