"""What a placement is: the equation of one transformer block, blind to what its sublayers are."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from core.errors import ConfigError, suggest
from lightning_modules.layers.attention import QKVNorm
from lightning_modules.layers.norms import NORMS, NormFactory

Sublayer = Callable[[Tensor], Tensor]
"""Attention, dense FFN or MoE: [batch, seq, dim] -> [batch, seq, dim]."""

Streams = tuple[Tensor, Tensor]
"""The state of a scheme with two streams, each [batch, seq, dim]."""


class Depth:
    """Where a block stands: `index` counts from 1 to `total`.

    What forward may read are the booleans: torch.compile specializes on every number that it meets, and a graph for
    each index would exceed its limit of recompilations, after which blocks silently run uncompiled.
    """

    def __init__(self, index: int, total: int) -> None:
        self.index, self.total = index, total
        self.is_first, self.is_last = index == 1, index == total


class Placement(nn.Module):
    """The residual topology of one block. Owns its norms (and scalar gates), never a matrix.

    A scheme overrides `forward`, and the class attributes where it differs from their defaults. A scheme that carries
    more than one stream overrides `enter` (first block only) and `leave` (last block only) as well; its state may be
    any tuple of tensors. Attention and FFN keep the same parameter names under every scheme.

    Args:
        depth: which block this is, of how many.
        norm: makes one norm over the model dimension.
        final_norm: whether the last block's output is normed; None takes `has_final_norm`.

    Raises:
        ConfigError: a norm kind that is not in `norms`.
    """

    has_final_norm: ClassVar[bool] = False
    default_init: ClassVar[str] = "plain"
    default_init_options: ClassVar[dict[str, Any]] = {}
    norms: ClassVar[tuple[str, ...]] = tuple(NORMS)  # the kinds under which the scheme is still the published one
    qkv_norm: QKVNorm | None = None  # of this block's attention
    inner_norm: bool = False  # one more norm in each of this block's sublayers, before its output matrix

    def __init__(self, depth: Depth, norm: NormFactory, final_norm: bool | None = None) -> None:
        super().__init__()
        if norm.kind not in self.norms:
            raise ConfigError("model.norm", norm.kind, f"{suggest(norm.kind, self.norms)} under {type(self).__name__}")
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


class TwoStreams(Placement):
    """Streams x and y that take the same branches: x is normed on its way, y only at the end, where x + N(y) leaves."""

    has_final_norm = True
    norms = tuple(kind for kind in NORMS if kind != "none")  # without norms both streams would be the same

    def enter(self, h: Tensor) -> Streams:
        return h, h

    def leave(self, state: Streams) -> Tensor:
        x, y = state
        return x + self.final_norm(y)
