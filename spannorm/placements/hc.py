"""Hyper-connections (2409.19606): n streams, mixed as each token says."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from spannorm.matrices import Matrix
from spannorm.norms import NormFactory
from spannorm.placements.base import Depth
from spannorm.placements.many_streams import Mapping, MixedStreams, check_positive
from spannorm.placements.streams import project
from spannorm.precision import at_least_fp32


class DynamicMapping(nn.Module):
    """pre = a1 tanh(x~ th_pre) + b_pre, res = a1 tanh(x~ th_res) + b_res, post = a2 tanh(x~ th_post) + b_post.

    x~_i = R_i / rms(R_i): of each stream by itself, by the same th. A gain of the norm would be absorbed by th. All of
    it is computed in fp32 or wider.

    Args:
        norm: says the streams' width, and what is added to the mean square.
        streams: their number n.
        number: of the sublayer, counted from 0; it starts by reading the stream of this number mod n.
        scale: where a1 and a2 start.
        static: whether the b's are all there is.

    Raises:
        InvalidArgument: `scale` is not a number > 0.
    """

    def __init__(self, norm: NormFactory, streams: int, number: int, scale: float, static: bool) -> None:
        super().__init__()
        check_positive(scale=scale)
        self.eps, self.streams = norm.eps, streams
        identity = torch.eye(streams)
        self.bias = nn.Parameter(torch.cat((identity[number % streams], torch.ones(streams), identity.flatten())))
        self.phi = None if static else nn.Parameter(torch.zeros(streams + 2, norm.dim))
        self.scale = None if static else nn.Parameter(torch.full((2,), float(scale)))

    def forward(self, streams: Tensor) -> tuple[Tensor, Mapping]:
        """Return the streams R [rows, n, dim], and their Mapping."""
        n = self.streams
        pre, post, res = at_least_fp32(self.bias).split((n, n, n * n))
        res = res.unflatten(0, (n, n))
        if self.phi is None or self.scale is None:
            rows = (one.expand(len(streams), *one.shape).contiguous() for one in (pre, post, res))
            return streams, Mapping(*rows)
        streams, projected = project(streams, self.phi, self.eps)
        a1, a2 = at_least_fp32(self.scale).unbind()
        dynamic = projected.tanh().unflatten(1, (-1, n))  # [n + 2, rows, old stream]
        mixing = torch.addcmul(res, dynamic[2:].transpose(0, 1), a1).contiguous()
        return streams, Mapping(torch.addcmul(pre, dynamic[0], a1), torch.addcmul(post, dynamic[1], a2), mixing)

    def matrices(self) -> Iterator[Matrix]:
        if self.phi is not None:
            yield Matrix("residual", self.phi, self.phi.size(1), self.phi.size(0), std=0.0)


class HC(MixedStreams):
    """x = sum_i pre_i R_i;  y = f(N x);  R <- res R + post y for f = A, then F.   2409.19606, algorithm 2

    R ─┬──────── res ─────── + ─       R: n streams; in: n copies of the embedding; out: their sum
       └─ pre ─ N ─ f ─ post ┘

    pre, post and res are b + a tanh(x~ th), x~_i = R_i / rms(R_i), of one a for pre and res, and one for post. th
    starts at 0, b so that the model is PreNorm: the sublayers read the streams in turn, and all write to all.

    Args:
        streams: the number n.
        scale: where the two factors a start.
        static: without a tanh(x~ th): all tokens are mixed alike.
    """

    def __init__(
        self,
        depth: Depth,
        norm: NormFactory,
        final_norm: bool | None = None,
        streams: int = 4,
        scale: float = 0.01,
        static: bool = False,
    ) -> None:
        super().__init__(depth, norm, final_norm, streams)
        number = 2 * (depth.index - 1)
        self.map_attn = DynamicMapping(norm, streams, number, scale, static)
        self.map_ffn = DynamicMapping(norm, streams, number + 1, scale, static)
