"""Pre-LN transformer (2002.04745)."""

from torch import Tensor

from spannorm.norms import NormFactory
from spannorm.placements.base import Depth, Placement, Sublayer
from spannorm.placements.gpas import make_gpas


class PreNorm(Placement):
    """y = x + A(N x);  out = y + F(N y).   2002.04745, Table 1

    x ─┬─ N ─ A ─ + ─┬─ N ─ F ─ + ─
       └──────────┘  └──────────┘

    Args:
        gpas: whether the stream is scaled down after each addition (GPAS, 2506.22049).
    """

    has_final_norm = True
    default_init = "megatron"
    plain_branches = True

    def __init__(self, depth: Depth, norm: NormFactory, final_norm: bool | None = None, gpas: bool = False) -> None:
        super().__init__(depth, norm, final_norm)
        self.norm_attn = norm(before_attention=True)
        self.norm_ffn = norm()
        self.gpas = make_gpas(gpas)

    def forward(self, x: Tensor, attn: Sublayer, ffn: Sublayer) -> Tensor:
        x = self.gpas(x + attn(self.norm_attn(x)))
        return self.gpas(x + ffn(self.norm_ffn(x)))
