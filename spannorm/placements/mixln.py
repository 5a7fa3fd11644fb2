"""Mix-LN (2412.13795): PostNorm in the early blocks, PreNorm in the late ones."""

import math

from torch import Tensor

from spannorm.errors import InvalidArgument
from spannorm.norms import NormFactory
from spannorm.placements.base import Depth, Placement, Sublayer
from spannorm.placements.postnorm import PostNorm
from spannorm.placements.prenorm import PreNorm


class MixLN(Placement):
    """PostNorm in the first floor(a L) of L blocks, PreNorm in the rest.   2412.13795

    x ─┬─ A ─ + ─ N ─┬─ F ─ + ─ N ─       block l <= a L
       └──────┘      └──────┘

    x ─┬─ N ─ A ─ + ─┬─ N ─ F ─ + ─       block l > a L
       └──────────┘  └──────────┘

    Args:
        post_fraction: the fraction a of PostNorm blocks, from 0 to 1.
        gpas: whether the stream is scaled down (GPAS, 2506.22049): the sums in PreNorm's blocks, in PostNorm's the
            skips.
    """

    has_final_norm = True

    def __init__(
        self,
        depth: Depth,
        norm: NormFactory,
        final_norm: bool | None = None,
        post_fraction: float = 0.25,
        gpas: bool = False,
    ) -> None:
        super().__init__(depth, norm, final_norm)
        if not 0 <= post_fraction <= 1:
            raise InvalidArgument("post_fraction", post_fraction, "a number in [0, 1]")
        num_post = math.floor(post_fraction * depth.total + 1e-9)  # 0.29 x 100 is 28.999...
        self.inner = (PostNorm if depth.index <= num_post else PreNorm)(depth, norm, False, gpas)

    def forward(self, x: Tensor, attn: Sublayer, ffn: Sublayer) -> Tensor:
        return self.inner(x, attn, ffn)
