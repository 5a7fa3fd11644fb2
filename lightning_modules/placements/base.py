"""What a placement is: the equation of one transformer block, blind to what its sublayers are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_modules.layers.attention import QKVNorm
from lightning_modules.layers.norms import NormFactory

Sublayer = Callable[[Tensor], Tensor]
"""Attention, dense FFN or MoE: [batch, seq, dim] -> [batch, seq, dim]."""


@dataclass(frozen=True)
class Depth:
    """Where a block stands: `index` counts from 1 to `total`."""

    index: int
    total: int

    @property
    def is_first(self) -> bool:
        return self.index == 1

    @property
    def is_last(self) -> bool:
        return self.index == self.total


class Placement(nn.Module):
    """The residual topology of one block. Owns its norms and nothing else.

    A scheme overrides `forward`, and the class attributes where it differs from their defaults. A scheme that carries
    more than one stream overrides `enter` (first block only) and `leave` (last block only) as well; its state may be
    any tuple of tensors. Attention and FFN keep the same parameter names under every scheme.

    Args:
        depth: which block this is, of how many.
        norm: makes one norm over the model dimension.
        final_norm: whether the last block's output is normed; None takes `has_final_norm`.
    """

    has_final_norm: ClassVar[bool] = False
    default_init: ClassVar[str] = "plain"
    default_init_options: ClassVar[dict[str, Any]] = {}
    qkv_norm: ClassVar[QKVNorm | None] = None
    inner_norm: ClassVar[bool] = False  # one more norm in each sublayer, before its output matrix

    def __init__(self, depth: Depth, norm: NormFactory, final_norm: bool | None = None) -> None:
        super().__init__()
        self.depth = depth
        wants_final = self.has_final_norm if final_norm is None else final_norm
        self.final_norm = norm() if wants_final and depth.is_last else nn.Identity()

    def enter(self, h: Tensor) -> Any:
        """Embedding output [batch, seq, dim] -> the state that goes through the blocks."""
        return h

    def forward(self, state: Any, attn: Sublayer, ffn: Sublayer) -> Any:
        """The block equation: the state before the block -> the state after it. Calls each sublayer once."""
        raise NotImplementedError

    def leave(self, state: Any) -> Tensor:
        """The state after the last block -> [batch, seq, dim] for the language-model head."""
        return self.final_norm(state)
