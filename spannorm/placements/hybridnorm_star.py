"""HybridNorm* (2503.04598): HybridNorm whose first block is a PreNorm block."""

from torch import Tensor, nn

from spannorm.norms import NormFactory
from spannorm.placements.base import Depth, Sublayer
from spannorm.placements.hybridnorm import HybridNorm


class HybridNormStar(HybridNorm):
    """y = x + A(N x);  out = y + F(N y) in the first block, HybridNorm after it.   2503.04598

    x ─┬─ N ─ A ─ + ─┬─ N ─ F ─ + ─       the first block; A: norms on q, k and v, each over one head
       └──────────┘  └──────────┘

    x ─┬─ A ─ + ─ N ─┬─ F ─ + ─           the others
       └──────┘      └──────┘
    """

    def __init__(self, depth: Depth, norm: NormFactory, final_norm: bool | None = None) -> None:
        super().__init__(depth, norm, final_norm)
        self.norm_attn = norm(before_attention=True) if depth.is_first else nn.Identity()

    def forward(self, x: Tensor, attn: Sublayer, ffn: Sublayer) -> Tensor:
        if not self.depth.is_first:
            return super().forward(x, attn, ffn)
        x = x + attn(self.norm_attn(x))
        return x + ffn(self.norm_ffn(x))
