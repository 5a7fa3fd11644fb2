"""Products of many tokens with many experts' matrices, each token with its own expert's; rows are sorted by expert.

    matmul(x, w, counts, transpose)   y_t = x_t w_e, or x_t w_e^T, with e the expert of row t
    outer(a, b, counts)               g_e = sum_t a_t^T b_t over the rows of expert e
    swiglu(x, w, v, counts)           h_t = silu(x_t w_e^T) * x_t v_e^T (2002.05202)

The gradient of each is made of the first two, so all have gradients of every order. These two are operators of their
own, opaque to torch.compile: the sizes of the groups are data, and a graph must not break over them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_ROWS = 4
"""Fewer rows go to another kernel of MKL, which adds up in another order: a token's output would depend, in its last
bit, on how many others go to the same expert. In inference mode they are filled up; training does not pay for it."""


class Products(NamedTuple):
    """One way to compute them.

    Attributes:
        matmul: (x [rows, p or q], w [experts, p, q], rows per expert [experts], transpose) -> [rows, q or p].
        outer: (a [rows, p], b [rows, q], rows per expert [experts]) -> [experts, p, q].
        swiglu: (x [rows, dim], w and v [experts, hidden, dim], rows per expert [experts]) -> [rows, hidden].
    """

    matmul: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    outer: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _register(name: str, matmul: Callable[..., Tensor], outer: Callable[..., Tensor]) -> Products:
    """Return the two as operators, NAME_matmul and NAME_outer, with shapes and gradients, and a swiglu of them."""
    ours = __name__.replace(".", "_")  # a copy of this file has operators of its own
    matmul_op = torch.library.custom_op(f"{ours}::{name}_matmul", matmul, mutates_args=())
    outer_op = torch.library.custom_op(f"{ours}::{name}_outer", outer, mutates_args=())

    def matmul_shape(x: Tensor, w: Tensor, counts: Tensor, transpose: bool) -> Tensor:
        return x.new_empty(x.size(0), w.size(1 if transpose else 2))

    def matmul_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.transpose = inputs
        ctx.save_for_backward(*tensors)

    def matmul_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, counts = ctx.saved_tensors
        needs_x, needs_w, *_ = ctx.needs_input_grad
        grad_x = matmul_op(grad, w, counts, not ctx.transpose) if needs_x else None
        left, right = (grad, x) if ctx.transpose else (x, grad)
        grad_w = outer_op(left, right, counts) if needs_w else None
        return grad_x, grad_w, None, None

    def outer_shape(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
        return a.new_empty(counts.size(0), a.size(1), b.size(1))

    def outer_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def outer_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b, counts = ctx.saved_tensors
        return matmul_op(b, grad, counts, True), matmul_op(a, grad, counts, False), None

    matmul_op.register_fake(matmul_shape)
    matmul_op.register_autograd(matmul_gradient, setup_context=matmul_save)
    outer_op.register_fake(outer_shape)
    outer_op.register_autograd(outer_gradient, setup_context=outer_save)

    def product(x: Tensor, w: Tensor, counts: Tensor, transpose: bool) -> Tensor:
        # Where a text is written token by token, the checks around an operator take longer than its products.
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            return matmul(x, w, counts, transpose)
        computed: Tensor = matmul_op(x, w, counts, transpose)
        return computed

    def swiglu(x: Tensor, w: Tensor, v: Tensor, counts: Tensor) -> Tensor:
        return F.silu(product(x, w, counts, True)) * product(x, v, counts, True)

    return Products(product, outer_op, swiglu)


def _loop_matmul(x: Tensor, w: Tensor, counts: Tensor, transpose: bool) -> Tensor:
    out = x.new_empty(x.size(0), w.size(1 if transpose else 2))
    at_least, start = MIN_ROWS if torch.is_inference_mode_enabled() else 0, 0
    for expert, size in enumerate(counts.long().tolist()):
        if size == 0:
            continue
        matrix = w[expert].t() if transpose else w[expert]
        rows, result = x[start : start + size], out[start : start + size]
        start += size
        if size < at_least:
            result.copy_(torch.mm(F.pad(rows, (0, 0, 0, at_least - size)), matrix)[:size])
        else:
            torch.mm(rows, matrix, out=result)
    return out


def _loop_outer(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    # Experts without rows get zeros, not None: under sharding all ranks must take part in the same gradients.
    out = a.new_empty(counts.size(0), a.size(1), b.size(1))
    sizes = counts.long().tolist()
    for left, right, result in zip(a.split(sizes), b.split(sizes), out.unbind(), strict=True):
        torch.mm(left.t(), right, out=result)
    return out


def _grouped_matmul(x: Tensor, w: Tensor, counts: Tensor, transpose: bool) -> Tensor:
    w = w.contiguous()
    return F.grouped_mm(x.contiguous(), w.transpose(1, 2) if transpose else w, offs=_ends(counts))


def _grouped_outer(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    out = F.grouped_mm(a.contiguous().t(), b.contiguous(), offs=_ends(counts))
    # Of an expert without rows some kernels leave what the memory held (pytorch/pytorch, issue 172439: B200).
    return out.masked_fill_((counts == 0)[:, None, None], 0.0)


def _ends(counts: Tensor) -> Tensor:
    return counts.to(torch.int32).cumsum(0, dtype=torch.int32)  # of whole numbers, whose sums a GPU adds in order


LOOP = _register("loop", _loop_matmul, _loop_outer)
"""One matrix product per expert over its contiguous rows; copies the counts to the host."""

GROUPED = _register("grouped", _grouped_matmul, _grouped_outer)
"""One `F.grouped_mm` for all experts. Widths must be multiples of 16 bytes; no float64."""
ONE_KERNEL = (9, 10)
"""Major compute capabilities of the GPUs on which GROUPED is one kernel, in bf16, and the host waits for nothing; else
F.grouped_mm takes the experts one by one and fetches the ends of their rows (ATen/native/cuda/GroupedBlas.cpp)."""
