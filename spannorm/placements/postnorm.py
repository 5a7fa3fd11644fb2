"""The original transformer (1706.03762)."""

from torch import Tensor

from spannorm.norms import NormFactory
from spannorm.placements.base import Depth, Placement, Sublayer


class PostNorm(Placement):
    """y = N(x + A(x));  out = N(y + F(y)).   1706.03762, section 3.1

    x ─┬─ A ─ + ─ N ─┬─ F ─ + ─ N ─
       └──────┘      └──────┘
    """

    def __init__(self, depth: Depth, norm: NormFactory, final_norm: bool | None = None) -> None:
        super().__init__(depth, norm, final_norm)
        self.norm_attn = norm()
        self.norm_ffn = norm()

    def forward(self, x: Tensor, attn: Sublayer, ffn: Sublayer) -> Tensor:
        x = self.norm_attn(x + attn(x))
        return self.norm_ffn(x + ffn(x))
