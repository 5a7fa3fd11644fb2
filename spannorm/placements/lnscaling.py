"""LayerNorm Scaling (2502.05795): PreNorm whose branches see ever smaller inputs."""

import torch
from torch import Tensor

from spannorm.norms import NormFactory
from spannorm.placements.base import Depth, Sublayer
from spannorm.placements.prenorm import PreNorm


class LNScaling(PreNorm):
    """y = x + A(N(x) / √l);  out = y + F(N(y) / √l),  l the index of the block, from 1.   2502.05795

    x ─┬─ N ─ 1/√l ─ A ─ + ─┬─ N ─ 1/√l ─ F ─ + ─
       └─────────────────┘  └─────────────────┘

    Meant for an init that does not scale with depth itself; the paper finds the two to be in each other's way.

    Args:
        gpas: whether the stream is scaled down after each addition (GPAS, 2506.22049).
    """

    default_init = "plain"
    plain_branches = False  # they depend on depth already
    scale: Tensor

    def __init__(self, depth: Depth, norm: NormFactory, final_norm: bool | None = None, gpas: bool = False) -> None:
        super().__init__(depth, norm, final_norm, gpas)
        # A tensor rather than a float: torch.compile would make a graph for each value.
        self.register_buffer("scale", torch.tensor(depth.index**-0.5), persistent=False)

    def forward(self, x: Tensor, attn: Sublayer, ffn: Sublayer) -> Tensor:
        x = self.gpas(x + attn(self.norm_attn(x) * self.scale))
        return self.gpas(x + ffn(self.norm_ffn(x) * self.scale))
