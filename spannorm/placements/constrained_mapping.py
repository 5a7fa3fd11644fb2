"""The coefficients of manifold-constrained hyper-connections (2512.24880), with res or without."""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from spannorm.matrices import Matrix
from spannorm.norms import NormFactory
from spannorm.placements.many_streams import Mapping, check_positive
from spannorm.placements.sinkhorn import sinkhorn
from spannorm.placements.streams import project
from spannorm.precision import at_least_fp32

Start = Literal["identity", "uniform"]
BESIDE = -8.0
"""The logits beside the diagonal where res starts near the identity; on it they are 0."""


class ConstrainedMapping(nn.Module):
    """h = a (v phi) + b with v = RMSNorm(vec R);  pre = sigmoid(h), post = 2 sigmoid(h), res = Sinkhorn(exp(h)).

    All of it is computed in fp32 or wider. It starts with pre = 1/n and post = 1, but for what phi adds.

    Args:
        norm: says the streams' width, and what is added to the mean square.
        streams: their number n.
        scale: where each a starts: of pre, post and res.
        std: the standard deviation that phi starts with.
        start: what res starts near; None: there is no res.
        iterations: of Sinkhorn and Knopp's.

    Raises:
        InvalidArgument: `scale` or `std` is not a number > 0.
    """

    def __init__(
        self, norm: NormFactory, streams: int, scale: float, std: float, start: Start | None = None, iterations: int = 1
    ) -> None:
        super().__init__()
        check_positive(scale=scale, std=std)
        self.eps, self.std, self.streams, self.iterations = norm.eps, std, streams, iterations
        self.sizes = [streams, streams] if start is None else [streams, streams, streams**2]
        biases = [torch.full((streams,), -math.log(streams - 1)), torch.zeros(streams)]
        if start is not None:
            beside = torch.full((streams, streams), BESIDE if start == "identity" else 0.0)
            biases.append(beside.fill_diagonal_(0.0).flatten())
        self.phi = nn.Parameter(std * torch.randn(sum(self.sizes), streams * norm.dim))
        self.scale = nn.Parameter(torch.full((len(self.sizes),), float(scale)))
        self.bias = nn.Parameter(torch.cat(biases))

    def forward(self, streams: Tensor) -> tuple[Tensor, Mapping]:
        """Return the streams R [rows, n, dim], and their Mapping."""
        streams, projected = project(streams, self.phi, self.eps)
        scales = at_least_fp32(self.scale).unbind()
        scale = torch.cat([one.expand(size) for one, size in zip(scales, self.sizes, strict=True)])
        logits = torch.addcmul(at_least_fp32(self.bias).unsqueeze(-1), projected, scale.unsqueeze(-1))
        # Together: four tokens of four streams are 32 numbers, and of fewer torch's sigmoid has another last bit.
        pre, post = logits[: 2 * self.streams].sigmoid().chunk(2)
        pre, post, res = pre.t().contiguous(), (2 * post).t().contiguous(), None
        if len(self.sizes) > 2:
            rest = logits[2 * self.streams :]
            res = sinkhorn(rest.unflatten(0, (self.streams, self.streams)), self.iterations)
            res = res.permute(2, 0, 1).contiguous()
        return streams, Mapping(pre, post, res)

    def matrices(self) -> Iterator[Matrix]:
        yield Matrix("residual", self.phi, self.phi.size(1), self.phi.size(0), std=self.std)
