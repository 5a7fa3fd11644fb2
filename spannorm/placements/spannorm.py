"""SpanNorm (2601.22580): the skip connection spans the whole block."""

from torch import Tensor, nn

from spannorm.norms import NormFactory
from spannorm.placements.base import Depth, Placement, Sublayer


class SpanNorm(Placement):
    """y = N(x + A(x'));  out = N(x + F(y)),  x' = N0(x) in the first block, else x.   2601.22580

    x ─┬─ A ─ + ─ N ─ F ─ + ─ N ─
       ├──────┘           │
       └──────────────────┘

    The topology is sure; that N0 stands in the first block only is known with medium certainty, hence the switch.

    Args:
        first_norm: whether the first block's attention reads N0(x) (its skips stay raw).
    """

    default_init = "scale_init"

    def __init__(
        self, depth: Depth, norm: NormFactory, final_norm: bool | None = None, first_norm: bool = True
    ) -> None:
        super().__init__(depth, norm, final_norm)
        self.first_norm = norm(before_attention=True) if first_norm and depth.is_first else nn.Identity()
        self.norm_attn = norm()
        self.norm_ffn = norm()

    def forward(self, x: Tensor, attn: Sublayer, ffn: Sublayer) -> Tensor:
        y = self.norm_attn(x + attn(self.first_norm(x)))
        return self.norm_ffn(x + ffn(y))
