"""KEEL (2601.19895): PostNorm with a much amplified skip connection and normed branches."""

import math
from typing import Literal

from torch import Tensor, nn

from spannorm.errors import InvalidArgument
from spannorm.norms import NormFactory
from spannorm.placements.base import Depth, Sublayer
from spannorm.placements.sandwich import Sandwich

Gain = float | Literal["2L", "sqrt"]


class Keel(Sandwich):
    """y = N(a x + A(N x));  out = N(a y + F(N y)),  a = 2L.   2601.19895

    x ─┬─ N ─ A ─ + ─ N ─┬─ N ─ F ─ + ─ N ─
       └──── a ───┘      └──── a ───┘

    Args:
        alpha: the factor a: the number of sublayers (2L), its square root (sqrt), or a constant.
        ease_in: whether the first block has a = 1 and no norm after attention; reconstructed, as reported by a
            reproduction.
    """

    has_final_norm, default_init, norms = False, "plain", ("rmsnorm", "layernorm")

    def __init__(
        self, depth: Depth, norm: NormFactory, final_norm: bool | None = None, alpha: Gain = "2L", ease_in: bool = False
    ) -> None:
        super().__init__(depth, norm, final_norm)
        gains = {"2L": 2.0 * depth.total, "sqrt": (2 * depth.total) ** 0.5}
        scale = gains.get(alpha, math.nan) if isinstance(alpha, str) else alpha
        if not 0 < scale < math.inf:
            raise InvalidArgument("alpha", alpha, "a number > 0, 2L or sqrt")
        self.alpha = 1.0 if (eased := ease_in and depth.is_first) else scale
        self.norm_attn_out = nn.Identity() if eased else self.norm_attn_out

    def forward(self, x: Tensor, attn: Sublayer, ffn: Sublayer) -> Tensor:
        x = self.norm_attn_out(self.alpha * x + attn(self.norm_attn_in(x)))
        return self.norm_ffn_out(self.alpha * x + ffn(self.norm_ffn_in(x)))
