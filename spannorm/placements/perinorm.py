"""Peri-LN (2502.02732): Sandwich-LN with a norm on the embedding."""

from torch import Tensor, nn

from spannorm.norms import NormFactory
from spannorm.placements.base import Depth
from spannorm.placements.sandwich import Sandwich


class PeriNorm(Sandwich):
    """x_1 = N(h), h the embedding output;  y = x + N(A(N x));  out = y + N(F(N y)).   2502.02732

    h ─ N ─ x ─┬─ N ─ A ─ N ─ + ─┬─ N ─ F ─ N ─ + ─
               └──────────────┘  └──────────────┘
    """

    def __init__(self, depth: Depth, norm: NormFactory, final_norm: bool | None = None) -> None:
        super().__init__(depth, norm, final_norm)
        self.norm_embedding = norm() if depth.is_first else nn.Identity()

    def enter(self, h: Tensor) -> Tensor:
        return self.norm_embedding(h)
