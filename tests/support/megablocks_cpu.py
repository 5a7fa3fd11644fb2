"""The real megablocks package without a GPU: its compiled modules and Triton kernels stood in for by plain torch.

What runs for real is all that it writes in Python: router, dMoE, permutation, autograd functions, load-balancing loss.
"""

import functools
import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor

OURS = "lightning_modules.layers.megablocks"
PACKAGES = ("megablocks", "stk", "grouped_gemm", "megablocks_ops")


@contextmanager
def megablocks_on_cpu() -> Iterator[None]:
    """Inside, `import megablocks` gives the package, and the project finds nothing against using it."""
    with patch.dict(sys.modules, _load()), patch(f"{OURS}.obstacle", lambda *_: None):
        yield


@functools.cache
def _load() -> dict[str, ModuleType]:
    compiled = {"megablocks_ops": _module("megablocks_ops", OPS), "grouped_gemm": _module("grouped_gemm", GROUPED_GEMM)}
    triton = {"triton": MagicMock(), "triton.language": MagicMock()}  # gone afterwards: torch looks for it
    with patch.dict(sys.modules, {**compiled, **triton}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernels = importlib.import_module("megablocks.backend.kernels")
        importlib.import_module("megablocks.layers.dmoe")
        kernels.gather, kernels.scatter, kernels.scatter_wgrad = gather, scatter, scatter_wgrad
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in PACKAGES}


def _module(name: str, members: dict[str, Any]) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members)
    return module


def sort(x: Tensor, end_bit: int, values: Tensor, indices: Tensor) -> None:
    ordered = x.sort(stable=True)
    values.copy_(ordered.values)
    indices.copy_(ordered.indices)


def histogram(x: Tensor, num_bins: int) -> Tensor:
    return torch.bincount(x, minlength=num_bins).int()


def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    out.copy_(x.cumsum(dim))


def exclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    out.copy_(x.cumsum(dim) - x)


def replicate_forward(x: Tensor, bins: Tensor, out: Tensor) -> None:
    out.copy_(x.repeat_interleave(bins.diff(prepend=bins.new_zeros(1)), dim=1))


def gmm(
    a: Tensor, b: Tensor, sizes: Tensor, trans_a: bool = False, trans_b: bool = False, c: Tensor | None = None
) -> Tensor:
    """Products by groups of rows of a; with trans_a of rows of both. Into c where it is given.

    A product over no rows is left out, as by grouped_gemm: what the memory held stays, here NaN.
    """
    rows = a.split(sizes.tolist())
    if trans_a:
        out = torch.stack([left.T @ right for left, right in zip(rows, b.split(sizes.tolist()), strict=True)])
        out[sizes == 0] = torch.nan
    else:
        out = torch.cat([left @ (right.T if trans_b else right) for left, right in zip(rows, b, strict=True)])
    if c is not None:
        c.data.copy_(out)
    return out if c is None else c


OPS = {
    function.__name__: function for function in (sort, histogram, inclusive_cumsum, exclusive_cumsum, replicate_forward)
}
GROUPED_GEMM = {"ops": SimpleNamespace(gmm=gmm), "backend": SimpleNamespace(gmm=gmm)}


def gather(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    """[tokens, dim] -> [tokens x top_k, dim] in the order of experts, times each assignment's weight."""
    out = x[indices // top_k]
    return out if weights is None else (out.float() * weights[indices, None].float()).to(x.dtype)


def scatter(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    """The way back: [tokens x top_k, dim] -> [tokens, dim], summed over each token's assignments."""
    scaled = x if weights is None else (x.float() * weights[indices, None].float()).to(x.dtype)
    out = torch.empty_like(x)
    out[indices.long()] = scaled
    return out.unflatten(0, (-1, top_k)).sum(dim=1)


def scatter_wgrad(x: Tensor, grad: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, top_k: int) -> Tensor:
    """The gradient of the weights: [tokens x top_k]."""
    out = x.new_empty(len(indices))
    out[indices.long()] = (x * grad[indices // top_k]).sum(dim=-1)
    return out
