"""Sub-LN (Magneto, 2210.06423): PreNorm with one more norm inside each sublayer."""

from spannorm.placements.prenorm import PreNorm


class SubLN(PreNorm):
    """y = x + A(N x);  out = y + F(N y), with a norm before the output matrix of A and F.   2210.06423

    x ─┬─ N ─ A ─ + ─┬─ N ─ F ─ + ─       A: heads ─ N ─ output matrix
       └──────────┘  └──────────┘         F: hidden ─ N ─ output matrix

    In a mixture of experts, the experts of a layer share the norm of their hidden layers.
    """

    default_init = "subln"
    inner_norm = True
