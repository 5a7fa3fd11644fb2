"""ResiDual (2304.14802): a PostNorm stream and a PreNorm-like one, with the same branches."""

from spannorm.norms import NormFactory
from spannorm.placements.base import Depth, Streams, Sublayer, TwoStreams


class ResiDual(TwoStreams):
    """h <- N(h + f(h)), r <- r + f(h) for f = A, then F;  r_0 = h_0;  out = h + N(r).   2304.14802

    h ─┬─ A ─┬─ + ─ N ─┬─ F ─┬─ + ─ N ─       out: h ───── +
       └─────│──┘      └─────│──┘                  r ─ N ──┘
    r ────── + ───────────── + ────────
    """

    def __init__(self, depth: Depth, norm: NormFactory, final_norm: bool | None = None) -> None:
        super().__init__(depth, norm, final_norm)
        self.norm_attn = norm()
        self.norm_ffn = norm()

    def forward(self, state: Streams, attn: Sublayer, ffn: Sublayer) -> Streams:
        h, r = state
        out = attn(h)
        h, r = self.norm_attn(h + out), r + out
        out = ffn(h)
        return self.norm_ffn(h + out), r + out
