"""SiameseNorm (2602.08064): a PostNorm and a PreNorm stream, read together and fed by the same branches."""

import torch
from torch import Tensor, nn

from spannorm.norms import NormFactory
from spannorm.placements.base import Depth, QKVNorm, Streams, Sublayer, TwoStreams


class SiameseNorm(TwoStreams):
    """o = f(N(x + N y)), x <- N(x + o/√l), y <- y + o for f = A, then F.   2602.08064, algorithm 1

    x ─┬───────────────────── + ─ N ─       x_0 = y_0 = h;  out = x + N(y)
       + ─ N ─ f ─ o ┬─ 1/√l ─┘
       N             │
    y ─┴──────────── + ──────────────

    Args:
        count_sublayers: l is the index of the block, from 1 (the paper's text), or twice that (the authors' code).
        normed_sum: the head reads N(N x + N y), as in the authors' language model, in place of x + N y.
        head_norms: norms on q, k and v, each over one head, as in the hybrid variant that the authors released.
    """

    scale: Tensor

    def __init__(
        self,
        depth: Depth,
        norm: NormFactory,
        final_norm: bool | None = None,
        count_sublayers: bool = False,
        normed_sum: bool = False,
        head_norms: bool = False,
    ) -> None:
        super().__init__(depth, norm, final_norm)
        self.qkv_norm = QKVNorm("qkv", per_head=True) if head_norms else None
        self.norms_out = nn.ModuleDict({at: norm() for at in "xy"}) if normed_sum and depth.is_last else None
        # A tensor, as in LNScaling.
        self.register_buffer("scale", torch.tensor((depth.index * (1 + count_sublayers)) ** -0.5), persistent=False)
        self.norms_attn, self.norms_ffn = (
            nn.ModuleDict({at: norm(at == "in" and feeds_attention) for at in ("y", "in", "x")})
            for feeds_attention in (True, False)
        )

    def forward(self, state: Streams, attn: Sublayer, ffn: Sublayer) -> Streams:
        for sublayer, norms in ((attn, self.norms_attn), (ffn, self.norms_ffn)):
            x, y = state
            out = sublayer(norms["in"](x + norms["y"](y)))
            state = norms["x"](x + out * self.scale), y + out
        return state

    def leave(self, state: Streams) -> Tensor:
        if self.norms_out is None:
            return super().leave(state)
        x, y = state
        return self.final_norm(self.norms_out["x"](x) + self.norms_out["y"](y))
