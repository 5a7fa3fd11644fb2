"""Keys and values of the tokens so far: a further token then needs no pass over those before it."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.layers.rope import Rope, rope_tables

ROWS = 4
"""Products are computed so many rows at a time: in linear layers those of all sequences together, in attention those of
one. The rest is left to other kernels, which add up in another order (MKL and torch's attention, fp32). In multiples of
it a token's logits are, bit for bit, those of `model(tokens)` over a text that is filled up to the cache's length,
itself a multiple. (Save where 4 tokens have no multiple of 32 numbers, as the scores of 4 experts: torch's exponential
of the last few of a tensor is another one; and of heads whose width is no multiple of 4.)"""


class Slots(NamedTuple):
    """Holds what one attention layer keeps, and says where the tokens at hand belong in it.

    Attributes:
        kept: keys and values, each [batch, kv_heads, length, head_dim], keys rotated; empty before the first tokens.
        length: the most tokens that a sequence can have.
        positions: [batch, seq], of the tokens at hand.
        place: the one that all of them have; None: they have several, or it is not known.
    """

    kept: list[Tensor]
    length: int
    positions: Tensor
    place: int | None

    def put(self, keys: Tensor, values: Tensor) -> list[Tensor]:
        """Write those of the tokens at hand, each [batch, kv_heads, seq, head_dim], and return all there are."""
        if not self.kept:  # only now is it known in what dtype, and how many heads this process has
            self.kept.extend(new.new_zeros(*new.shape[:2], self.length, new.size(-1)) for new in (keys, values))
        if not torch.compiler.is_compiling() and self.place is not None:  # a graph would be made for each place
            for kept, new in zip(self.kept, (keys, values), strict=True):
                kept[:, :, self.place] = new[:, :, 0]
            return self.kept
        rows = torch.arange(len(self.positions), device=self.positions.device)[:, None]
        for kept, new in zip(self.kept, (keys, values), strict=True):
            kept[rows, :, self.positions] = new.transpose(1, 2)
        return self.kept


def filled_up(x: Tensor) -> Tensor:
    """Return queries or a mask [batch, heads or 1, seq, any] with copies of the last one, to a multiple of ROWS."""
    missing = -x.size(2) % ROWS
    return torch.cat((x, x[:, :, -1:].expand(-1, -1, missing, -1)), dim=2) if missing else x


class KVCache:
    """The slots of all layers. Its length is fixed, and what is not written yet is masked.

    Args:
        num_layers: of the model.
        length: the most tokens that a sequence can have.
    """

    def __init__(self, num_layers: int, length: int) -> None:
        self.length = length
        self.layers: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self._rope: Rope | None = None

    def rope(self, head_dim: int, theta: float, device: torch.device) -> Rope:
        """Return `rope_tables` of the cache's length, made once."""
        if self._rope is None:
            self._rope = rope_tables(self.length, head_dim, theta, device)
        return self._rope

    def at(self, positions: Tensor) -> Iterator[Slots]:
        """Yield each layer's slots for tokens at these positions [batch, seq]."""
        # A GPU would have to be waited for.
        places = set(positions.flatten().tolist()) if positions.device.type == "cpu" else set()
        place = places.pop() if len(places) == 1 else None
        for kept in self.layers:
            yield Slots(kept, self.length, positions, place)

    def mask(self, positions: Tensor) -> Tensor:
        """Return who may look at whom, bool [batch, 1, seq, length], filled up: all up to the token's own position."""
        return filled_up(positions[:, None, :, None]) >= torch.arange(self.length, device=positions.device)

    def select(self, rows: Tensor) -> "KVCache":
        """Return a copy with these sequences [rows] of it, each as often as it is named."""
        other = KVCache(len(self.layers), self.length)
        other._rope = self._rope
        other.layers = [[tensor.index_select(0, rows) for tensor in kept] for kept in self.layers]
        return other
