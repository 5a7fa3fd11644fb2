"""The base class of placements: the equation of one transformer block, blind to what its sublayers are."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from spannorm.errors import InvalidArgument
from spannorm.import_path import is_import_path
from spannorm.matrices import Matrix, owned_matrices
from spannorm.norms import NORMS, NormFactory

Sublayer = Callable[[Tensor], Tensor]
"""Attention, a dense FFN or a mixture of experts: [batch, seq, dim] -> [batch, seq, dim]."""

Streams = tuple[Tensor, Tensor]
"""The state of a scheme with two streams, each [batch, seq, dim]."""


class QKVNorm(NamedTuple):
    """Says which projections attention has to normalize before the rotary rotation.

    Attributes:
        on: which of q, k and v, as letters.
        per_head: whether over each head's dimensions (2503.04598) or over all heads together (OLMo 2, 2501.00656).
    """

    on: str
    per_head: bool


class Depth:
    """Says where a block stands in the model.

    A placement's `forward` may read the booleans, not the numbers: torch.compile specializes on every number that it
    meets, and a graph for each index would exceed its limit of recompilations, after which blocks silently run
    uncompiled.

    Args:
        index: number of the block, counted from 1.
        total: number of blocks.

    Raises:
        InvalidArgument: the index is not from 1 to the total.
    """

    def __init__(self, index: int, total: int) -> None:
        if not 1 <= index <= total:
            raise InvalidArgument("index", index, f"an integer from 1 to total={total}: blocks count from 1")
        self.index, self.total = index, total
        self.is_first, self.is_last = index == 1, index == total


class Placement(nn.Module):
    """The residual topology of one block.

    It owns the block's norms, scalar gates, and the small matrices that it mixes, weighs or gates streams with; never a
    matrix of a sublayer.

    A model calls `enter` before its first block, each block as `state = block(state, attn, ffn)`, and `leave` after its
    last one. A scheme overrides `forward`, and the class attributes where it differs from their defaults. A scheme
    that carries more than one stream overrides `enter` and `leave` as well; its state may be any tuple of tensors.

    Args:
        depth: which block this is, of how many.
        norm: makes one norm over the model dimension.
        final_norm: whether the last block's output is normed; None takes `has_final_norm`.

    Attributes:
        has_final_norm: whether the published scheme norms the last block's output.
        default_init: the init that the scheme was published with: a name in INITS, or an import path.
        default_init_options: that init's options.
        norms: the kinds of norms under which the scheme is still the published one. A kind by import path is not
            held against them, a gated norm by the kind that is gated.
        qkv_norm: the norms that this block's attention is to put on its projections; None for none.
        inner_norm: whether each sublayer of this block is to have one more norm before its output matrix.
        plain_branches: whether each sublayer's output is added to the stream as it is, x + f(N x), or to each of
            several times a coefficient, and nothing that is learned multiplies a stream. Scaling with depth multiplies
            what a sublayer puts out: it has to reach the stream, and is all that bounds what learning changes there.
        state_grows: whether each block adds to the tensors of the state. torch.compile makes a graph for each number of
            them: a model then compiles the sublayers, and not the block around them.

    Raises:
        InvalidArgument: the kind of norm is not in `norms`.
    """

    has_final_norm: ClassVar[bool] = False
    default_init: ClassVar[str] = "plain"
    default_init_options: ClassVar[dict[str, Any]] = {}
    norms: ClassVar[tuple[str, ...]] = tuple(NORMS)
    qkv_norm: QKVNorm | None = None
    inner_norm: bool = False
    plain_branches: ClassVar[bool] = False
    state_grows: ClassVar[bool] = False

    def __init__(self, depth: Depth, norm: NormFactory, final_norm: bool | None = None) -> None:
        super().__init__()
        norm.constructor()  # refuses an unknown kind, also under a scheme that makes no norm
        kind, _ = norm.base
        if not is_import_path(kind) and kind in NORMS and kind not in self.norms:
            valid = f"one of {', '.join(sorted(self.norms))} under {type(self).__name__}"
            raise InvalidArgument(norm.base_argument, kind, valid)
        self.depth = depth
        wants_final = self.has_final_norm if final_norm is None else final_norm
        self.final_norm = norm() if wants_final and depth.is_last else nn.Identity()

    def enter(self, h: Tensor) -> Any:
        """Turn the embedding output [batch, seq, dim] into the state that goes through the blocks."""
        return h

    def forward(self, state: Any, attn: Sublayer, ffn: Sublayer) -> Any:
        """Apply the block equation to the state before the block and return the state after it.

        Args:
            state: what `enter` or the block before has returned.
            attn: attention, called once.
            ffn: the feed-forward layer or mixture of experts, called once.
        """
        raise NotImplementedError

    def leave(self, state: Any) -> Tensor:
        """Turn the state after the last block into what the head reads, [batch, seq, dim]."""
        return self.final_norm(state)

    def hidden(self, state: Any) -> Tensor:
        """Return what monitors take for the hidden state, [batch, seq, features]: all streams of it side by side."""
        return torch.cat(state, dim=-1) if isinstance(state, tuple | list) else state

    def readers(self) -> dict[str, nn.Module]:
        """Return what weighs the sources that a sublayer reads, by sublayer: attn, ffn, and out for the head.

        Each is called in the block's forward pass, and has a method `weights` that takes the same arguments and returns
        the weight of each source, [sources, batch, seq]. Monitors ask for it.
        """
        return {}

    def matrices(self) -> Iterator[Matrix]:
        """Yield each matrix that the placement owns, once, with the role `residual`.

        They are those of its parts that have a method `matrices` themselves, norms among them. A scheme with parameters
        of its own of two dimensions or more overrides this and yields those that are matrices. What is not yielded
        (biases, scalars, gains) is not drawn, and does not decay.
        """
        return owned_matrices(self)

    def mappings(self) -> tuple[nn.Module, ...]:
        """Return one module a sublayer, in order, that says what the sublayer reads of several streams, and what
        becomes of these: its forward returns a tuple that ends in a spannorm.Mapping. Monitors hook them. A scheme of
        one stream, or of fixed coefficients, has none.
        """
        return ()


class TwoStreams(Placement):
    """The base class of schemes with two streams that take the same branches.

    Stream x is normed on its way, stream y only at the end, where x + N(y) leaves.
    """

    has_final_norm = True
    norms = tuple(kind for kind in NORMS if kind != "none")  # without norms both streams would be the same

    def enter(self, h: Tensor) -> Streams:
        return h, h

    def leave(self, state: Streams) -> Tensor:
        x, y = state
        return x + self.final_norm(y)
