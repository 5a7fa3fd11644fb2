"""Identity-carry hyper-connections (2608.30320): manifold-constrained ones whose streams are not mixed."""

from spannorm.norms import NormFactory
from spannorm.placements.base import Depth
from spannorm.placements.constrained_mapping import ConstrainedMapping
from spannorm.placements.many_streams import MixedStreams


class IHC(MixedStreams):
    """x = sum_i pre_i R_i;  y = f(N x);  R <- R + post y for f = A, then F.   2608.30320, 2607.28611, 2609.33895

    R ─┬──────────────────── + ─       R: n streams; in: n copies of the embedding; out: their sum
       └─ pre ─ N ─ f ─ post ┘

    That is `mhc` with res = I, of which these three designs find that it adds little: pre = sigmoid(h) and
    post = 2 sigmoid(h) with h = a (v phi) + b, v = RMSNorm(vec R).

    Args:
        streams: the number n.
        scale: where the two factors a start.
        std: the standard deviation that phi starts with; not published, as with `mhc`.
    """

    plain_branches = True

    def __init__(
        self,
        depth: Depth,
        norm: NormFactory,
        final_norm: bool | None = None,
        streams: int = 4,
        scale: float = 0.01,
        std: float = 0.02,
    ) -> None:
        super().__init__(depth, norm, final_norm, streams)
        self.map_attn = ConstrainedMapping(norm, streams, scale, std)
        self.map_ffn = ConstrainedMapping(norm, streams, scale, std)
