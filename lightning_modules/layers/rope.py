"""Rotary position embedding (2104.09864), in the rotate-half layout of Llama checkpoints."""

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]
"""cos and sin, fp32, each [seq, head_dim]; of packed documents [batch, 1, seq, head_dim]."""


def rope_tables(seq_len: int, head_dim: int, theta: float, device: torch.device) -> Rope:
    """Return cos and sin of position x theta^(-2i / head_dim), for positions 0 to seq_len - 1."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32, device=device), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def at_positions(rope: Rope, positions: Tensor) -> Rope:
    """Return the tables' rows of these positions [batch, seq]."""
    cos, sin = rope
    return cos[positions][:, None], sin[positions][:, None]


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) of x [batch, heads, seq, head_dim] by its position's angle."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
