"""ReZero (2003.04887): no norms in the block, but a learned gate that starts closed."""

import torch
from torch import Tensor, nn

from spannorm.norms import NormFactory
from spannorm.placements.base import Depth, Placement, Sublayer


class ReZero(Placement):
    """y = x + g A(x);  out = y + g F(y),  g one learned number a block, 0 at the start.   2003.04887

    x ─┬─ A ─ g ─ + ─┬─ F ─ g ─ + ─
       └──────────┘  └──────────┘
    """

    has_final_norm = True

    def __init__(self, depth: Depth, norm: NormFactory, final_norm: bool | None = None) -> None:
        super().__init__(depth, norm, final_norm)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, attn: Sublayer, ffn: Sublayer) -> Tensor:
        x = x + self.gate * attn(x)
        return x + self.gate * ffn(x)
