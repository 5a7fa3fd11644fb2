"""The bottom-to-top connection (2206.00330): PostNorm with one more skip, around the whole block."""

from torch import Tensor

from lightning_modules.placements.base import Sublayer
from lightning_modules.placements.postnorm import PostNorm


class B2T(PostNorm):
    """y = N(x + A(x));  out = N(x + y + F(y)), without that x in the last block.   2206.00330

    x ─┬─ A ─ + ─ N ─┬─ F ─ + ─ N ─
       ├──────┘      └──────┤
       └────────────────────┘   not in the last block

    Without a norm the stream would double at every block.
    """

    default_init = "b2t"
    norms = ("rmsnorm", "layernorm", "dyt")

    def forward(self, x: Tensor, attn: Sublayer, ffn: Sublayer) -> Tensor:
        y = self.norm_attn(x + attn(x))
        skips = y if self.depth.is_last else x + y
        return self.norm_ffn(skips + ffn(y))
