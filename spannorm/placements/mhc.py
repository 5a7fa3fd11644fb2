"""Manifold-constrained hyper-connections (2512.24880): streams mixed by matrices whose rows and columns sum to 1."""

from spannorm.errors import InvalidArgument
from spannorm.norms import NormFactory
from spannorm.placements.base import Depth
from spannorm.placements.constrained_mapping import ConstrainedMapping, Start
from spannorm.placements.many_streams import MixedStreams


class MHC(MixedStreams):
    """x = sum_i pre_i R_i;  y = f(N x);  R <- res R + post y, res doubly stochastic, for f = A, then F.   2512.24880

    R ─┬──────── res ─────── + ─       R: n streams; in: n copies of the embedding; out: their sum
       └─ pre ─ N ─ f ─ post ┘

    With v = RMSNorm(vec R) over all n d features and h = a (v phi) + b (equations 7 to 9): pre = sigmoid(h),
    post = 2 sigmoid(h), and res is exp(h), its columns divided by their sums, then its rows, `iterations` times.

    Args:
        streams: the number n.
        scale: where the three factors a start.
        std: the standard deviation that phi starts with; not published. It is what parts the streams: with phi = 0 they
            would stay the same for ever.
        start: whether res starts near the identity or with all entries alike; not published.
        iterations: of Sinkhorn and Knopp's.
    """

    def __init__(
        self,
        depth: Depth,
        norm: NormFactory,
        final_norm: bool | None = None,
        streams: int = 4,
        scale: float = 0.01,
        std: float = 0.02,
        start: Start = "identity",
        iterations: int = 20,
    ) -> None:
        super().__init__(depth, norm, final_norm, streams)
        if start not in ("identity", "uniform"):
            raise InvalidArgument("start", start, "identity or uniform")
        if type(iterations) is not int or not 1 <= iterations <= 1000:
            raise InvalidArgument("iterations", iterations, "an integer from 1 to 1000")
        self.map_attn = ConstrainedMapping(norm, streams, scale, std, start, iterations)
        self.map_ffn = ConstrainedMapping(norm, streams, scale, std, start, iterations)
