"""Norm kinds, orthogonal to where a placement puts them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from core.errors import lookup
from lightning_modules.config import ModelConfig
from lightning_modules.layers.rms_norm import rms_norm


class DyT(nn.Module):
    """Dynamic tanh: g * tanh(a x) + b, elementwise (2503.10622, eq. 1), without statistics. Keeps shape and dtype."""

    def __init__(self, dim: int, eps: float = 0.0, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([alpha]))
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh(self.alpha * x) * self.weight + self.bias).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """Computed in the gain's precision, whatever x has: torch's own warns under autocast, and is not fused there."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.to(self.weight.dtype), self.weight, self.eps).to(x.dtype)


def _rms_norm(dim: int, eps: float) -> nn.Module:
    return RMSNorm(dim, eps=eps)


def _layer_norm(dim: int, eps: float) -> nn.Module:
    return nn.LayerNorm(dim, eps=eps)


def _no_norm(dim: int, eps: float) -> nn.Module:
    return nn.Identity()


NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "rmsnorm": _rms_norm,  # 1910.07467
    "layernorm": _layer_norm,  # 1607.06450
    "dyt": DyT,
    "none": _no_norm,
}


class NormFactory(NamedTuple):
    """Makes one norm of the model's kind at a call.

    Attributes:
        kind: name in NORMS.
        dim: number of features that it normalizes over.
        eps: added to the variance or mean square.
    """

    kind: str
    dim: int
    eps: float

    def __call__(self) -> nn.Module:
        return lookup("model.norm", self.kind, NORMS)(self.dim, self.eps)


def make_norm(config: ModelConfig, dim: int) -> nn.Module:
    """A norm of the configured kind over `dim` features."""
    return NormFactory(config.norm, dim, config.norm_eps)()
