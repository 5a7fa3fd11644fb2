"""Rotary position embedding (2104.09864), in the rotate-half layout of Llama checkpoints."""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.layers import by_hand

Rope = tuple[Tensor, Tensor]
"""cos and sin, fp32, each [seq, head_dim]; of packed documents [batch, 1, seq, head_dim]."""


def rope_tables(seq_len: int, head_dim: int, theta: float, device: torch.device) -> Rope:
    """cos and sin of position x theta^(-2i / head_dim), for positions 0 to seq_len - 1."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32, device=device), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def at_positions(rope: Rope, positions: Tensor) -> Rope:
    """The tables' rows of these positions [batch, seq]."""
    cos, sin = rope
    return cos[positions][:, None], sin[positions][:, None]


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) of x [batch, heads, seq, head_dim] by its position's angle."""
    cos, sin = rope
    if by_hand.pays(x):
        turned: Tensor = _Rotation.apply(x, cos, sin)
        return turned
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class _Rotation(torch.autograd.Function):
    """Linear, so its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        turned = x * cos
        for part, other, signed in zip(turned.chunk(2, -1), x.chunk(2, -1)[::-1], (-sin, sin), strict=True):
            part.add_(other * signed[..., : other.size(-1)])  # addcmul_ rounds otherwise, and not always alike
        return turned

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotation.apply(grad, cos, -sin), None, None
