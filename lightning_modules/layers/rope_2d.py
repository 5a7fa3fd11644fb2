"""Rotary positions of patches in a grid: half of each head's pairs turns with the row, half with the column."""

import torch
from torch import Tensor

from lightning_modules.layers.rope import Rope


def rope_tables_2d(rows: int, columns: int, head_dim: int, theta: float, before: int, device: torch.device) -> Rope:
    """Return cos and sin, each [before + rows x columns, head_dim], of the patches row by row.

    The scalar product of a query and a key then depends on how many rows and columns lie between them. Each half is
    turned as text of its own: by row or column x theta^(-2i / (head_dim / 2)), for i from 0 to head_dim / 4 - 1.

    Args:
        rows, columns: of the grid.
        head_dim: a multiple of 4.
        theta: base of the frequencies.
        before: positions in front of the patches that are nowhere in the grid, and not turned: a class token.
        device: of the tables.
    """
    half = head_dim // 2
    frequencies = theta ** (-torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
    by_row, by_column = (
        torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies) for length in (rows, columns)
    )
    patches = torch.cat((by_row[:, None].expand(-1, columns, -1), by_column.expand(rows, -1, -1)), dim=-1).flatten(0, 1)
    angles: Tensor = torch.cat((patches.new_zeros(before, half), patches))
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()
