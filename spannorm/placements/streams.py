"""Projects, reads and writes several streams in as few passes over memory as torch's operators allow.

`project` and `read` hand the streams on beside their result: in the backward pass the gradients of the streams' three
uses (by a mapping, by the sublayer, by the next streams) are added up one into the other, and never stand side by side.
What is kept for the backward pass is the streams in their own type, once, and small coefficients. torch.compile, which
sees to that by itself, gets the bare formulas.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spannorm.precision import at_least_fp32, without_autocast


def project(streams: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (the streams, weight x / rms(x) [outputs, rows]) for the rows x of the streams, in fp32 or wider.

    Args:
        streams: of any shape; a row is as long as the weight's rows.
        weight: [outputs, inputs]; the gain of the norm, if there is one, is part of it.
        eps: added to the mean square.
    """
    if torch.compiler.is_compiling():
        return streams, _project(streams, weight, eps)[0]
    handed_on, projected, _ = _Project.apply(streams, weight, eps)
    return handed_on, projected


def read(streams: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """Return (the streams R [rows, n, dim], sum_i pre_i R_i [rows, dim] in their type) for pre [rows, n]."""
    if torch.compiler.is_compiling():
        return streams, _read(streams, pre)
    handed_on, x = _Read.apply(streams, pre)
    return handed_on, x


def write(streams: Tensor, res: Tensor | None, post: Tensor, y: Tensor) -> Tensor:
    """Return res R + post (x) y, of the shape and type of the streams R [rows, n, dim].

    Args:
        streams: R.
        res: [rows, n, n], new streams by old ones; None: each is kept.
        post: [rows, n].
        y: [rows, dim], of any type.
    """
    if torch.compiler.is_compiling():
        return _write(streams, res, post, y)
    written: Tensor = _Write.apply(streams, res, post, y)
    return written


def _project(streams: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (what `project` does, 1 / rms of each row)."""
    rows = at_least_fp32(streams.reshape(-1, weight.size(1)))
    with without_autocast(rows):
        inverse = (torch.linalg.vector_norm(rows, dim=-1).square() / rows.size(-1) + eps).rsqrt()
        return (F.linear(rows, weight.to(rows.dtype)).t() * inverse).contiguous(), inverse


def _read(streams: Tensor, pre: Tensor) -> Tensor:
    with without_autocast(streams):
        return torch.bmm(pre.unsqueeze(1), streams.to(pre.dtype)).squeeze(1).to(streams.dtype)


def _write(streams: Tensor, res: Tensor | None, post: Tensor, y: Tensor) -> Tensor:
    kept, factors = streams.to(post.dtype), (post.unsqueeze(-1), y.to(post.dtype).unsqueeze(1))
    if res is None:
        return torch.addcmul(kept, *factors).to(streams.dtype)
    with without_autocast(streams):
        return torch.bmm(res, kept).addcmul_(*factors).to(streams.dtype)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        projected, inverse = _project(streams, weight, eps)
        ctx.save_for_backward(streams, weight, projected, inverse)
        return streams.view_as(streams), projected, inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, of_projected: Tensor, of_inverse: Tensor) -> tuple[Tensor, Tensor, None]:
        streams, weight, projected, inverse = ctx.saved_tensors
        rows = at_least_fp32(streams.reshape(-1, weight.size(1)))
        of_inverse = of_inverse + (of_projected * projected).sum(0) / inverse
        along = of_inverse * inverse.pow(3) / -rows.size(-1)
        scaled = of_projected * inverse
        with without_autocast(rows):
            total = torch.addcmul(grad.reshape(rows.shape).to(rows.dtype), rows, along.unsqueeze(-1))
            total.addmm_(scaled.t(), weight.to(rows.dtype))
            of_weight = scaled @ rows
        return total.to(streams.dtype).view_as(streams), of_weight.to(weight.dtype), None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(streams, pre)
        return streams.view_as(streams), _read(streams, pre)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, of_x: Tensor) -> tuple[Tensor, Tensor]:
        streams, pre = ctx.saved_tensors
        of_x = of_x.to(pre.dtype)
        with without_autocast(streams):
            of_pre = torch.bmm(streams.to(pre.dtype), of_x.unsqueeze(-1)).squeeze(-1)
        total = torch.addcmul(grad.to(pre.dtype), pre.unsqueeze(-1), of_x.unsqueeze(1))
        return total.to(streams.dtype), of_pre


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, res: Tensor | None, post: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(None if res is None else streams, res, post, y)
        return _write(streams, res, post, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        streams, res, post, y = ctx.saved_tensors
        wide, of_streams, of_res = grad.to(post.dtype).contiguous(), grad, None
        with without_autocast(grad):
            if res is not None:
                of_streams = torch.bmm(res.mT, wide).to(streams.dtype)
                of_res = torch.bmm(wide, streams.to(post.dtype).mT)
            of_post = torch.bmm(wide, y.to(post.dtype).unsqueeze(-1)).squeeze(-1)
            of_y = torch.bmm(post.unsqueeze(1), wide).squeeze(1).to(y.dtype)
        return of_streams, of_res, of_post, of_y
