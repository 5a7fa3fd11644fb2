"""OLMo 2's reordered norm (2501.00656): each sublayer's output is normed, its input is not."""

from torch import Tensor

from spannorm.norms import NormFactory
from spannorm.placements.base import Depth, Placement, QKVNorm, Sublayer


class OutputNorm(Placement):
    """y = x + N(A(x));  out = y + N(F(y)), with QK-norm in A.   2501.00656

    x ─┬─ A ─ N ─ + ─┬─ F ─ N ─ + ─       A: norms on q and k, each over the whole projection
       └──────────┘  └──────────┘

    The published init truncates its normal draws at three standard deviations; ours does not, unless
    `model.init_truncation=3` says so.
    """

    has_final_norm = True
    qkv_norm = QKVNorm("qk", per_head=False)

    def __init__(self, depth: Depth, norm: NormFactory, final_norm: bool | None = None) -> None:
        super().__init__(depth, norm, final_norm)
        self.norm_attn = norm()
        self.norm_ffn = norm()

    def forward(self, x: Tensor, attn: Sublayer, ffn: Sublayer) -> Tensor:
        x = x + self.norm_attn(attn(x))
        return x + self.norm_ffn(ffn(x))
