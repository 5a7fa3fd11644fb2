"""Norm kinds, orthogonal to where a placement puts them."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from core.errors import lookup, require
from core.options import check_arguments
from lightning_modules.config import ModelConfig
from lightning_modules.layers.rms_norm import rms_norm

AUTHORS_ALPHAS = {
    1024: (1.0, 1.0),
    2048: (1.0, 0.5),
    4096: (0.8, 0.2),
    5120: (0.6, 0.15),
    8192: (0.2, 0.05),
}
"""By width, where dyt's a starts in the authors' language models: (before attention, elsewhere)."""


class DyT(nn.Module):
    """Dynamic tanh: g * tanh(a x) + b, elementwise (2503.10622, eq. 1), without statistics. Keeps shape and dtype.

    It does not bring its input to a size, so both a and the size of the stream matter. A language model takes the
    authors' recipe for one by default: an `a` that depends on the width and is larger before attention, and a learned
    scalar on the embedding (EmbeddingScale).

    Args:
        dim: number of features.
        eps: not used; all kinds of norms take it.
        alpha: where a starts; null: as the authors have it for a model of this width.
        alpha_attention: likewise in a norm that attention alone reads.
        embedding_scale: where the scalar on the embedding starts: unit for a stream of unit variance (1/std of the
            embedding's init), sqrt for sqrt(dim), or a number; null: no scalar. The authors say sqrt, which at their
            width of 4096 and std of 0.02 is nearly unit; in a narrow model it is far too small.
        before_attention: whether this is such a norm.
        width: the model's; null: dim.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 0.0,
        alpha: float | None = None,
        alpha_attention: float | None = None,
        embedding_scale: float | Literal["unit", "sqrt"] | None = "unit",
        before_attention: bool = False,
        width: int | None = None,
    ) -> None:
        super().__init__()
        at_attention, elsewhere = _authors_alphas(dim if width is None else width)
        starts = {
            "alpha": elsewhere if alpha is None else alpha,
            "alpha_attention": at_attention if alpha_attention is None else alpha_attention,
        }
        for name, start in starts.items():
            require(0 < start < math.inf, f"model.norm_options.{name}", start, "a number > 0, or null")
        self.alpha = nn.Parameter(torch.tensor([float(starts["alpha_attention" if before_attention else "alpha"])]))
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh(self.alpha * x) * self.weight + self.bias).to(x.dtype)


def _authors_alphas(width: int) -> tuple[float, float]:
    """(before attention, elsewhere), at the nearest of the authors' widths on a logarithmic scale."""
    return AUTHORS_ALPHAS[min(AUTHORS_ALPHAS, key=lambda theirs: abs(math.log(theirs / width)))]


class EmbeddingScale(nn.Module):
    """The embedding output times one learned number, which dyt needs in a language model (2503.10622, section 5).

    Args:
        start: of the number; None: the initialization sets it to 1/std of the embedding.
    """

    def __init__(self, start: float | None) -> None:
        super().__init__()
        self.is_unit = start is None
        self.weight = nn.Parameter(torch.tensor([1.0 if start is None else float(start)]))

    def forward(self, h: Tensor) -> Tensor:
        """[batch, seq, dim] -> the same shape and dtype."""
        return (h * self.weight).to(h.dtype)


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


NORMS: dict[str, Callable[..., nn.Module]] = {
    "rmsnorm": _rms_norm,  # 1910.07467
    "layernorm": _layer_norm,  # 1607.06450
    "dyt": DyT,
    "none": _no_norm,
}
"""By name: (dim, eps, and what `model.norm_options` may say) -> a norm."""

LEAST_FEATURES = {"rmsnorm": 2, "layernorm": 3}
"""Of fewer, a norm keeps the sign alone: what it reads would have no gradient."""


class NormFactory(NamedTuple):
    """Makes one norm of the model's kind at a call.

    Attributes:
        kind: name in NORMS.
        dim: number of features that it normalizes over.
        eps: added to the variance or mean square.
        options: arguments of that kind.
        width: the model's; None: dim.
    """

    kind: str
    dim: int
    eps: float
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    width: int | None = None

    def __call__(self, before_attention: bool = False) -> nn.Module:
        """A new norm.

        Args:
            before_attention: whether attention alone reads its output, which dyt asks for.
        """
        made = lookup("model.norm", self.kind, NORMS)
        check_arguments("model.norm_options", made, self.options, "dim", "eps", "before_attention", "width")
        least = LEAST_FEATURES.get(self.kind, 1)
        valid = f"dyt, none, or {least} features and more: over {self.dim} nothing but a sign is left"
        require(self.dim >= least, "model.norm", self.kind, valid)
        if made is DyT:
            return DyT(self.dim, self.eps, **self.options, before_attention=before_attention, width=self.width)
        return made(self.dim, self.eps, **self.options)


def norm_factory(config: ModelConfig, dim: int) -> NormFactory:
    """What makes norms of the configured kind over `dim` features."""
    return NormFactory(config.norm, dim, config.norm_eps, config.norm_options, config.dim)


def make_norm(config: ModelConfig, dim: int) -> nn.Module:
    """One of them."""
    return norm_factory(config, dim)()


def embedding_scale(config: ModelConfig) -> nn.Module:
    """The scalar on the embedding that the configured kind of norm asks for, or nothing."""
    start = config.norm_options.get("embedding_scale", "unit") if config.norm == "dyt" else None
    if start is None:
        return nn.Identity()
    if start == "unit":
        return EmbeddingScale(None)
    start = config.dim**0.5 if start == "sqrt" else start
    require(0 < start < math.inf, "model.norm_options.embedding_scale", start, "a number > 0, unit, sqrt or null")
    return EmbeddingScale(start)
