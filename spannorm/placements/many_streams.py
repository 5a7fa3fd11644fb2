"""The base classes of schemes with n streams, of which each sublayer reads a mixture and to which it writes."""

import math
from typing import NamedTuple

from torch import Tensor, nn

from spannorm.errors import InvalidArgument
from spannorm.norms import NormFactory
from spannorm.placements.base import Depth, Placement, Sublayer
from spannorm.placements.streams import read, write

MAX_STREAMS = 64
"""Far more than anybody has tried."""


class Mapping(NamedTuple):
    """Says, of each token, what a sublayer reads of n streams and what becomes of them. Rows are tokens.

    Attributes:
        pre: weight of each stream in what the sublayer reads, [rows, n]; or of each of its features, [rows, n, dim],
            times n.
        post: weight of the sublayer's output in each stream, [rows, n].
        res: what is kept of the streams, [rows, n, n], new ones by old ones; None: each is kept as it is.
    """

    pre: Tensor
    post: Tensor
    res: Tensor | None


class ManyStreams(Placement):
    """The base class of schemes with n streams: copies of the embedding output at first, in the end summed and normed.

    The state is one tensor, [batch, seq, streams, dim].

    Args:
        depth, norm, final_norm: as every placement has them.
        streams: the number n.

    Raises:
        InvalidArgument: `streams` is not in its range.
    """

    has_final_norm = True
    default_init = "megatron"
    map_attn: nn.Module
    map_ffn: nn.Module

    def __init__(self, depth: Depth, norm: NormFactory, final_norm: bool | None = None, streams: int = 4) -> None:
        super().__init__(depth, norm, final_norm)
        if type(streams) is not int or not 2 <= streams <= MAX_STREAMS:
            raise InvalidArgument("streams", streams, f"an integer from 2 to {MAX_STREAMS}")
        self.streams = streams

    def enter(self, h: Tensor) -> Tensor:
        return h.unsqueeze(2).expand(-1, -1, self.streams, -1).contiguous()

    def leave(self, state: Tensor) -> Tensor:
        return self.final_norm(state.sum(2))

    def hidden(self, state: Tensor) -> Tensor:
        return state.flatten(2)

    def mappings(self) -> tuple[nn.Module, ...]:
        return self.map_attn, self.map_ffn


class MixedStreams(ManyStreams):
    """The base class of hyper-connections: x = sum_i pre_i R_i;  y = f(N x);  R <- res R + post y for f = A, then F.

    A subclass makes `map_attn` and `map_ffn`: of the streams [rows, n, dim] they return these and the Mapping.
    """

    def __init__(self, depth: Depth, norm: NormFactory, final_norm: bool | None = None, streams: int = 4) -> None:
        super().__init__(depth, norm, final_norm, streams)
        self.norm_attn = norm(before_attention=True)
        self.norm_ffn = norm()

    def forward(self, state: Tensor, attn: Sublayer, ffn: Sublayer) -> Tensor:
        tokens, streams = state.shape[:2], state.flatten(0, 1)
        for mapping, norm, sublayer in ((self.map_attn, self.norm_attn, attn), (self.map_ffn, self.norm_ffn, ffn)):
            streams, (pre, post, res) = mapping(streams)
            streams, x = read(streams, pre)
            y = sublayer(norm(x.unflatten(0, tokens)))
            streams = write(streams, res, post, y.flatten(0, 1))
        return streams.unflatten(0, tokens)


def check_positive(**values: float) -> None:
    """Refuse what is not a number > 0.

    Raises:
        InvalidArgument: names the argument.
    """
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise InvalidArgument(name, value, "a number > 0")
