"""Gated residuals (2608.30320): n streams, of which each sublayer reads what a gate lets through."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spannorm.errors import InvalidArgument
from spannorm.matrices import Matrix, owned_matrices
from spannorm.norms import NormFactory
from spannorm.placements.base import Depth, Sublayer
from spannorm.placements.many_streams import ManyStreams, Mapping, check_positive
from spannorm.placements.streams import write
from spannorm.precision import at_least_fp32, without_autocast


class GatedMapping(nn.Module):
    """x = (1/n) sum_i G_i R^_i, G = sigmoid(W_u silu((1/n) W_d vec R^)), s = 2 sigmoid((1/n) W_w vec R^).

    R^_i = N(R_i), each by a norm of its own. s is computed in fp32 or wider; G, which gates every feature, in the type
    of all products.

    Args:
        norm: makes a norm of a stream.
        before_attention: whether attention alone reads x.
        streams: their number n.
        rank: of the gate; None: an eighth of the width, or 1.
        std: the standard deviation that W_d, W_u and W_w start with.

    Raises:
        InvalidArgument: `std` is not a number > 0, or `rank` not an integer >= 1.
    """

    def __init__(self, norm: NormFactory, before_attention: bool, streams: int, rank: int | None, std: float) -> None:
        super().__init__()
        check_positive(std=std)
        if rank is not None and (type(rank) is not int or not 1 <= rank <= streams * norm.dim):
            raise InvalidArgument("rank", rank, f"null, or an integer from 1 to {streams * norm.dim}")
        self.std, self.rank_is_explicit = std, rank is not None
        features, inner = streams * norm.dim, max(1, norm.dim // 8) if rank is None else rank
        self.norms = nn.ModuleList(norm(before_attention) for _ in range(streams))
        self.down = nn.Parameter(std * torch.randn(inner, features))
        self.up = nn.Parameter(std * torch.randn(features, inner))
        self.weigh = nn.Parameter(std * torch.randn(streams, features))

    def forward(self, streams: Tensor) -> tuple[Tensor, Mapping]:
        """Return (x [rows, dim], the Mapping of the normed streams) of the streams R [rows, n, dim]."""
        normed = torch.stack([norm(x) for norm, x in zip(self.norms, streams.unbind(1), strict=True)], 1)
        flat, n = normed.flatten(1), len(self.norms)
        gates = F.linear(F.silu(F.linear(flat, self.down) / n), self.up).sigmoid().view_as(normed)
        with without_autocast(flat):
            # 2 sigmoid(z) = 1 + tanh(z / 2), whose last bit does not depend on how many numbers there are.
            post = 1 + (F.linear(at_least_fp32(flat), at_least_fp32(self.weigh)) / (2 * n)).tanh()
        return (gates * normed).mean(1).to(streams.dtype), Mapping(gates, post, None)

    def matrices(self) -> Iterator[Matrix]:
        yield from owned_matrices(self)
        for weight, explicit in ((self.down, False), (self.up, self.rank_is_explicit), (self.weigh, False)):
            yield Matrix("residual", weight, weight.size(1), weight.size(0), explicit, self.std)


class GR(ManyStreams):
    """x = (1/n) sum_i G_i N(R_i);  y = f(x);  R_i <- R_i + s_i y for f = A, then F.   2608.30320, section 2.2

    R ─┬────────────── + ─       R: n streams; in: n copies of the embedding; out: their sum
       └─ N ─ G ─ f ─ s ┘

    G = sigmoid(W_u silu((1/n) W_d vec N(R))) gates every feature of every stream, s = 2 sigmoid((1/n) W_w vec N(R))
    weighs the streams. Each stream has a norm of its own for each sublayer, and x is not normed again.

    Args:
        streams: the number n.
        rank: of the gate: rows of W_d; None: an eighth of the model's width.
        std: the standard deviation that W_d, W_u and W_w start with; not published. G starts near 1/2, s near 1.
    """

    plain_branches = True

    def __init__(
        self,
        depth: Depth,
        norm: NormFactory,
        final_norm: bool | None = None,
        streams: int = 4,
        rank: int | None = None,
        std: float = 0.02,
    ) -> None:
        super().__init__(depth, norm, final_norm, streams)
        self.map_attn = GatedMapping(norm, True, streams, rank, std)
        self.map_ffn = GatedMapping(norm, False, streams, rank, std)

    def forward(self, state: Tensor, attn: Sublayer, ffn: Sublayer) -> Tensor:
        tokens, streams = state.shape[:2], state.flatten(0, 1)
        for mapping, sublayer in ((self.map_attn, attn), (self.map_ffn, ffn)):
            x, (_, post, _) = mapping(streams)
            y = sublayer(x.unflatten(0, tokens))
            streams = write(streams, None, post, y.flatten(0, 1))
        return streams.unflatten(0, tokens)
