"""DeepNorm (2203.00555): PostNorm with an amplified skip connection."""

from torch import Tensor

from spannorm.norms import NormFactory
from spannorm.placements.base import Depth, Sublayer
from spannorm.placements.postnorm import PostNorm


class DeepNorm(PostNorm):
    """y = N(a x + A(x));  out = N(a y + F(y)),  a = (2L)^(1/4).   2203.00555, figure 2 (decoder-only)

    x ─┬─ A ─ + ─ N ─┬─ F ─ + ─ N ─
       └─ a ──┘      └─ a ──┘

    Needs norms that divide by a statistic: nothing else undoes the growth by a.

    Args:
        gpas: whether the skip, and it alone, is scaled down (GPAS, 2506.22049).
    """

    default_init = "deepnorm"
    norms = ("rmsnorm", "layernorm")

    def __init__(self, depth: Depth, norm: NormFactory, final_norm: bool | None = None, gpas: bool = False) -> None:
        super().__init__(depth, norm, final_norm, gpas)
        self.alpha = (2 * depth.total) ** 0.25

    def forward(self, x: Tensor, attn: Sublayer, ffn: Sublayer) -> Tensor:
        x = self.norm_attn(self.alpha * self.gpas(x) + attn(x))
        return self.norm_ffn(self.alpha * self.gpas(x) + ffn(x))
