"""Sandwich-LN (2105.13290): a norm before and after each sublayer, inside its branch."""

from torch import Tensor

from spannorm.norms import NormFactory
from spannorm.placements.base import Depth, Placement, Sublayer
from spannorm.placements.gpas import make_gpas


class Sandwich(Placement):
    """y = x + N(A(N x));  out = y + N(F(N y)).   2105.13290

    x ─┬─ N ─ A ─ N ─ + ─┬─ N ─ F ─ N ─ + ─
       └──────────────┘  └──────────────┘

    Args:
        gpas: whether the stream is scaled down after each addition (GPAS, 2506.22049).
    """

    has_final_norm = True
    default_init = "megatron"

    def __init__(self, depth: Depth, norm: NormFactory, final_norm: bool | None = None, gpas: bool = False) -> None:
        super().__init__(depth, norm, final_norm)
        self.norm_attn_in, self.norm_attn_out = norm(before_attention=True), norm()
        self.norm_ffn_in, self.norm_ffn_out = norm(), norm()
        self.gpas = make_gpas(gpas)

    def forward(self, x: Tensor, attn: Sublayer, ffn: Sublayer) -> Tensor:
        x = self.gpas(x + self.norm_attn_out(attn(self.norm_attn_in(x))))
        return self.gpas(x + self.norm_ffn_out(ffn(self.norm_ffn_in(x))))
