"""HybridNorm (2503.04598): QKV-norm in attention, PostNorm around the FFN."""

from torch import Tensor

from spannorm.norms import NormFactory
from spannorm.placements.base import Depth, Placement, QKVNorm, Sublayer


class HybridNorm(Placement):
    """y = x + A(x), with QKV-norm in A;  z = N(y);  out = z + F(z).   2503.04598, algorithm 1

    x ─┬─ A ─ + ─ N ─┬─ F ─ + ─       A: norms on q, k and v, each over one head
       └──────┘      └──────┘
    """

    has_final_norm = True
    default_init = "megatron"
    default_init_options = {"std": None}  # noqa: RUF012 - annotated in the base class
    qkv_norm = QKVNorm("qkv", per_head=True)

    def __init__(self, depth: Depth, norm: NormFactory, final_norm: bool | None = None) -> None:
        super().__init__(depth, norm, final_norm)
        self.norm_ffn = norm()

    def forward(self, x: Tensor, attn: Sublayer, ffn: Sublayer) -> Tensor:
        x = self.norm_ffn(x + attn(x))
        return x + ffn(x)
