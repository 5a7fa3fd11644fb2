"""The bottom-to-top connection (2206.00330): PostNorm with one more skip, around the whole block."""

from torch import Tensor

from spannorm.norms import NormFactory
from spannorm.placements.base import Depth, Sublayer
from spannorm.placements.postnorm import PostNorm


class B2T(PostNorm):
    """y = N(x + A(x));  out = N(x + y + F(y)), without that x in the last block.   2206.00330

    x ─┬─ A ─ + ─ N ─┬─ F ─ + ─ N ─
       ├──────┘      └──────┤
       └────────────────────┘   not in the last block

    Without a norm the stream would double at every block.

    Args:
        last_skip: whether that x stands in the last block too, as in the authors' code.
    """

    default_init = "b2t"
    norms = ("rmsnorm", "layernorm", "dyt", "derf")

    def __init__(
        self, depth: Depth, norm: NormFactory, final_norm: bool | None = None, last_skip: bool = False
    ) -> None:
        super().__init__(depth, norm, final_norm)
        self.spans = last_skip or not depth.is_last

    def forward(self, x: Tensor, attn: Sublayer, ffn: Sublayer) -> Tensor:
        y = self.norm_attn(x + attn(x))
        skips = x + y if self.spans else y
        return self.norm_ffn(skips + ffn(y))
