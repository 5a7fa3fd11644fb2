"""The original transformer (1706.03762)."""

from torch import Tensor

from spannorm.norms import NormFactory
from spannorm.placements.base import Depth, Placement, Sublayer
from spannorm.placements.gpas import make_gpas


class PostNorm(Placement):
    """y = N(x + A(x));  out = N(y + F(y)).   1706.03762, section 3.1

    x ─┬─ A ─ + ─ N ─┬─ F ─ + ─ N ─
       └──────┘      └──────┘

    Args:
        gpas: whether the skip, and it alone, is scaled down (GPAS, 2506.22049).
    """

    def __init__(self, depth: Depth, norm: NormFactory, final_norm: bool | None = None, gpas: bool = False) -> None:
        super().__init__(depth, norm, final_norm)
        self.norm_attn = norm()
        self.norm_ffn = norm()
        self.gpas = make_gpas(gpas)

    def forward(self, x: Tensor, attn: Sublayer, ffn: Sublayer) -> Tensor:
        x = self.norm_attn(self.gpas(x) + attn(x))
        return self.norm_ffn(self.gpas(x) + ffn(x))
