"""Keys and values of the tokens so far: a further token then needs no pass over those before it."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.config import ModelConfig


class Slots(NamedTuple):
    """What one attention layer keeps, and where the tokens at hand belong in it.

    Attributes:
        keys, values: [batch, kv_heads, length, head_dim]; keys are rotated.
        positions: [batch, seq], of the tokens at hand.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor

    def put(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write those of the tokens at hand, each [batch, kv_heads, seq, head_dim], and return all there are."""
        rows = torch.arange(len(self.positions), device=self.positions.device)[:, None]
        for kept, new in ((self.keys, keys), (self.values, values)):
            kept[rows, :, self.positions] = new.transpose(1, 2).to(kept.dtype)
        return self.keys, self.values


class KVCache:
    """The slots of all layers. Its length is fixed, and what is not written yet is masked.

    Args:
        config: of the model.
        batch: number of sequences.
        length: the most tokens that one of them can have.
        like: a tensor of the device and dtype in which the model computes.
    """

    def __init__(self, config: ModelConfig, batch: int, length: int, like: Tensor) -> None:
        self.length = length
        device = like.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
        shape = (config.num_layers, 2, batch, config.kv_heads, length, config.head_dim)
        self.content = torch.zeros(shape, dtype=dtype, device=like.device)

    def at(self, positions: Tensor) -> Iterator[Slots]:
        """Each layer's slots for tokens at these positions [batch, seq]."""
        for keys, values in self.content:
            yield Slots(keys, values, positions)

    def mask(self, positions: Tensor) -> Tensor:
        """Who may look at whom: bool [batch, 1, seq, length], up to the token's own position."""
        return positions[:, None, :, None] >= torch.arange(self.length, device=positions.device)

    def select(self, rows: Tensor) -> "KVCache":
        """A copy with these sequences [rows] of it, each as often as it is named."""
        other = object.__new__(KVCache)
        other.length, other.content = self.length, self.content.index_select(2, rows)
        return other
