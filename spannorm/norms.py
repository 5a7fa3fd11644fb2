"""Norm kinds, orthogonal to where a placement puts them."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spannorm.errors import InvalidArgument
from spannorm.import_path import find
from spannorm.matrices import Matrix
from spannorm.precision import at_least_fp32, without_autocast

AUTHORS_ALPHAS = {
    1024: (1.0, 1.0),
    2048: (1.0, 0.5),
    4096: (0.8, 0.2),
    5120: (0.6, 0.15),
    8192: (0.2, 0.05),
}
"""Where the authors' language models start DyT's a, by width: (in norms before attention, elsewhere)."""


class DyT(nn.Module):
    """Dynamic tanh: g * tanh(a x) + b, elementwise (2503.10622, eq. 1), without statistics. Keeps shape and dtype.

    It does not bring its input to a size, so both a and the size of the stream matter. A language model takes the
    authors' recipe for one by default: an `a` that depends on the width and is larger before attention, and a learned
    scalar on the embedding (EmbeddingScale).

    Args:
        dim: number of features.
        eps: not used; every kind of norm takes it.
        alpha: where a starts; None takes the authors' value for a model of this width.
        alpha_attention: where a starts in a norm that attention alone reads; None likewise.
        embedding_scale: where the scalar on the embedding starts: `unit` for a stream of unit variance (1/std of the
            embedding's init), `sqrt` for sqrt(dim), or a number; None for no scalar. The authors say sqrt, which at
            their width of 4096 and std of 0.02 is nearly unit; in a narrow model it is far too small. The norm itself
            does not use it: NormFactory.embedding_scale makes the scalar.
        before_attention: whether attention alone reads this norm's output.
        width: width of the model; None takes dim.

    Raises:
        InvalidArgument: `alpha` or `alpha_attention` is not a positive number.
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
            if not 0 < start < math.inf:
                raise InvalidArgument(name, start, "a number > 0, or null")
        self.alpha = nn.Parameter(torch.tensor([float(starts["alpha_attention" if before_attention else "alpha"])]))
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh(self.alpha * x) * self.weight + self.bias).to(x.dtype)


class Derf(nn.Module):
    """Dynamic erf: g * erf(a x + s) + b, elementwise (2512.10938, eq. 10), without statistics. Keeps shape and dtype.

    Like DyT it does not bring its input to a size. Where a and s start is known from reimplementations of it, which
    agree, and not from the authors' text. That a language model scales its embedding is DyT's recipe (EmbeddingScale),
    taken over here: without it, a stream of standard deviation 0.02 leaves erf where it is a straight line.

    Args:
        dim: number of features.
        alpha: where a starts.
        shift: where s starts.
        embedding_scale: where the scalar on the embedding starts, as of DyT.

    Raises:
        InvalidArgument: `alpha` is not a positive number, or `shift` no finite one.
    """

    def __init__(
        self,
        dim: int,
        alpha: float = 0.5,
        shift: float = 0.0,
        embedding_scale: float | Literal["unit", "sqrt"] | None = "unit",
    ) -> None:
        super().__init__()
        if not 0 < alpha < math.inf:
            raise InvalidArgument("alpha", alpha, "a number > 0")
        if not math.isfinite(shift):
            raise InvalidArgument("shift", shift, "a finite number")
        self.alpha = nn.Parameter(torch.tensor([float(alpha)]))
        self.shift = nn.Parameter(torch.tensor([float(shift)]))
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.erf(self.alpha * x + self.shift) * self.weight + self.bias).to(x.dtype)


def _authors_alphas(width: int) -> tuple[float, float]:
    """Return (before attention, elsewhere) at the nearest of the authors' widths on a logarithmic scale."""
    return AUTHORS_ALPHAS[min(AUTHORS_ALPHAS, key=lambda theirs: abs(math.log(theirs / width)))]


class EmbeddingScale(nn.Module):
    """Multiplies the embedding output by one learned number, as DyT needs in a language model (2503.10622, section 5).

    Args:
        start: where the number starts; None lets `initialize` set it to 1/std of the embedding.
    """

    def __init__(self, start: float | None) -> None:
        super().__init__()
        self.is_unit = start is None
        self.weight = nn.Parameter(torch.tensor([1.0 if start is None else float(start)]))

    def forward(self, h: Tensor) -> Tensor:
        """Return the embedding [batch, seq, dim], scaled, in the same shape and dtype."""
        return (h * self.weight).to(h.dtype)


class RMSNorm(nn.RMSNorm):
    """Root mean square norm (1910.07467), computed in the wider of the precisions of its input and its gain.

    torch's own warns under autocast, where gain and input differ in type, and is not fused there.
    """

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x [..., dim], in its shape and dtype."""
        wider = torch.promote_types(x.dtype, self.weight.dtype)
        gain = self.weight.to(wider)
        return F.rms_norm(x.to(wider), self.normalized_shape, gain, self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm (1607.06450) whose gain and bias may be narrower than its input; torch's refuses them."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x [..., dim], in its shape and dtype."""
        gain, bias = (p.to(torch.promote_types(x.dtype, p.dtype)) for p in (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, gain, bias, self.eps)


def _rms_norm(dim: int, eps: float) -> nn.Module:
    return RMSNorm(dim, eps=eps)


def _layer_norm(dim: int, eps: float) -> nn.Module:
    return LayerNorm(dim, eps=eps)


def _no_norm(dim: int, eps: float) -> nn.Module:
    return nn.Identity()


class GatedNorm(nn.Module):
    """y * sigmoid(up silu(down y)), y = N(x): a gate of low rank on each feature (2601.22966). Keeps shape and dtype.

    The equation and the rank of 16 are its authors', who do not say how the two matrices start. Here `down` [rank, dim]
    is drawn with 1/sqrt(dim), and `up` [dim, rank] starts at 0 by default, so that every gate starts at 1/2. What reads
    such a norm starts with half of its input; a reader that norms in turn (queries and keys under QK-norm) does not see
    it. The gate is computed in fp32 or wider.

    Args:
        dim: number of features.
        eps: of N.
        kind: N: any other name in NORMS.
        kind_options: its options.
        rank: number of features between the two matrices.
        up_std: standard deviation that `up` starts with.
        before_attention: whether attention alone reads this norm's output.
        width: width of the model; None takes dim.

    Raises:
        InvalidArgument: another kind, an option that it has not, a rank below 1, or a negative `up_std`.
    """

    def __init__(
        self,
        dim: int,
        eps: float,
        kind: str = "rmsnorm",
        kind_options: dict[str, Any] | None = None,
        rank: int = 16,
        up_std: float = 0.0,
        before_attention: bool = False,
        width: int | None = None,
    ) -> None:
        super().__init__()
        kinds, options = sorted(NORMS.keys() - {"gatednorm"}), kind_options or {}
        if kind not in kinds:
            raise InvalidArgument("kind", kind, f"one of {', '.join(kinds)}")
        known = [name for name in list(inspect.signature(NORMS[kind]).parameters)[1:] if name not in FILLED_IN]
        for name, value in options.items():
            if name not in known:
                raise InvalidArgument(f"kind_options.{name}", value, f"one of {', '.join(known) or 'no options'}")
        if type(rank) is not int or rank < 1:
            raise InvalidArgument("rank", rank, "an integer >= 1")
        if not 0 <= up_std < math.inf:
            raise InvalidArgument("up_std", up_std, "a number >= 0")
        try:
            self.norm = NormFactory(kind, dim, eps, options, width)(before_attention)
        except InvalidArgument as error:
            raise InvalidArgument(f"kind_options.{error.name}", error.value, error.valid) from error
        self.up_std = float(up_std)
        self.down = nn.Parameter(torch.empty(rank, dim).normal_(std=dim**-0.5))
        self.up = nn.Parameter(torch.empty(dim, rank).normal_(std=up_std))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return (y * self._gates_of(y)).to(x.dtype)

    def gates(self, x: Tensor) -> Tensor:
        """Return what forward multiplies the norm of x with, of its shape."""
        return self._gates_of(self.norm(x))

    def matrices(self) -> Iterator[Matrix]:
        """Yield the two matrices of the gate."""
        rank, dim = self.down.shape
        yield Matrix("residual", self.down, dim, rank, std=dim**-0.5)
        yield Matrix("residual", self.up, rank, dim, width_is_explicit=True, std=self.up_std)

    def _gates_of(self, y: Tensor) -> Tensor:
        with without_autocast(y):
            hidden = F.silu(F.linear(at_least_fp32(y), at_least_fp32(self.down)))
            return F.linear(hidden, at_least_fp32(self.up)).sigmoid()


@runtime_checkable
class Gated(Protocol):
    """A part of a block that multiplies features by gates, which monitors show. It derives from nothing here."""

    def gates(self, *inputs: Any) -> Tensor:
        """Return the gates for the arguments of forward, of any shape, in [0, 1]."""


NORMS: dict[str, Callable[..., nn.Module]] = {
    "rmsnorm": _rms_norm,  # 1910.07467
    "layernorm": _layer_norm,  # 1607.06450
    "dyt": DyT,
    "derf": Derf,
    "gatednorm": GatedNorm,
    "none": _no_norm,
}
"""The norm kinds by name. Each is called with the number of features, and with those of `eps`, `before_attention` and
`width` that it takes, and the options of that kind; it returns a module that keeps the shape of its input."""

POINTWISE = ("dyt", "derf")
"""The kinds that act on each feature by itself: what they give depends on the size of the stream."""

LEAST_FEATURES = {"rmsnorm": 2, "layernorm": 3}
"""Over fewer features a norm keeps nothing but the sign, so that what it reads would have no gradient."""

FILLED_IN = ("eps", "before_attention", "width")
"""The parameters of a norm kind that NormFactory fills in by itself where the kind takes them."""


def find_norm(name: str) -> Callable[..., nn.Module]:
    """Return what makes norms of a kind: an entry of NORMS, or a class of your own by its import path.

    Raises:
        InvalidArgument: there is none of that name.
    """
    return find("norm", name, NORMS)


@dataclass(frozen=True)
class NormFactory:
    """Makes the norms of a model: a placement calls it once for every norm that it has.

    Attributes:
        kind: name in NORMS, or the import path of a class or function of your own.
        dim: number of features that a norm is taken over.
        eps: number added to the variance or the mean square.
        options: further arguments of that kind.
        width: width of the model, where a norm is over fewer features than that; None takes `dim`.
    """

    kind: str
    dim: int
    eps: float = 1e-6
    options: Mapping[str, Any] = field(default_factory=dict)
    width: int | None = None

    @property
    def base(self) -> tuple[str, Mapping[str, Any]]:
        """Return the kind and its options, of a gated norm those of the norm that is gated."""
        if self.kind != "gatednorm":
            return self.kind, self.options
        return self.options.get("kind", "rmsnorm"), self.options.get("kind_options") or {}

    @property
    def base_argument(self) -> str:
        """Return what says the kind of `base`, for an error about it: the kind, or the option of a gated norm."""
        return "norm" if self.kind != "gatednorm" else "norm_options.kind"

    def constructor(self) -> Callable[..., nn.Module]:
        """Return what makes a norm of this kind. A subclass may put a faster equivalent in its place."""
        return find_norm(self.kind)

    def __call__(self, before_attention: bool = False) -> nn.Module:
        """Make one norm.

        Args:
            before_attention: whether attention alone reads the norm's output, which DyT distinguishes.

        Raises:
            InvalidArgument: an unknown kind, an option outside its range, or too few features.
        """
        if self.dim < 1:
            raise InvalidArgument("dim", self.dim, "an integer >= 1")
        kind, _ = self.base
        least = LEAST_FEATURES.get(kind, 1)
        if self.dim < least:
            valid = f"dyt, derf, none, or {least} features and more: over {self.dim} nothing but a sign is left"
            raise InvalidArgument(self.base_argument, kind, valid)
        make = self.constructor()
        taken = inspect.signature(make).parameters
        ours = {"eps": self.eps, "before_attention": before_attention, "width": self.width}
        norm = make(self.dim, **{name: ours[name] for name in FILLED_IN if name in taken}, **self.options)
        if not isinstance(norm, nn.Module):
            raise InvalidArgument("norm", self.kind, f"what makes a torch.nn.Module, not a {type(norm).__name__}")
        return norm

    def embedding_scale(self) -> nn.Module:
        """Make the scalar on the embedding output that this kind of norm asks for: of DyT and Derf one, else nothing.

        Raises:
            InvalidArgument: their option `embedding_scale` is not in its range.
        """
        kind, options = self.base
        start = options.get("embedding_scale", "unit") if kind in POINTWISE else None
        if start is None:
            return nn.Identity()
        if start == "unit":
            return EmbeddingScale(None)
        start = (self.dim if self.width is None else self.width) ** 0.5 if start == "sqrt" else start
        if not isinstance(start, int | float) or not 0 < start < math.inf:
            name = "embedding_scale" if self.kind != "gatednorm" else "kind_options.embedding_scale"
            raise InvalidArgument(name, start, "a number > 0, unit, sqrt or null")
        return EmbeddingScale(start)
