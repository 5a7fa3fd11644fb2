"""SwiGLU (2002.05202) of many tokens by their experts' matrices, an expert at a time.

What is between an expert's products is computed while they are in the processor's cache, and what the backward pass
needs between them exists for one expert at a time. Two operators that are opaque to torch.compile, as in
expert_products.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.layers import experts
from lightning_modules.layers.cpu_kernels.double_backward import differentiable_gradients
from lightning_modules.layers.expert_products import LOOP, Products


class ExpertMLP(experts.ExpertMLP):
    """The experts' MLP whose loop over them computes the SwiGLU by `FUSED_LOOP`."""

    def products(self) -> Products:
        """Return how the products are computed; a backend other than the loop keeps its own way."""
        return FUSED_LOOP if self.backend == "loop" else super().products()


def _empty_products(x: Tensor, w: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape = x.size(0), w.size(1)
    return x.new_empty(shape), x.new_empty(shape), x.new_empty(shape)


def _empty_gradients(grad: Tensor, x: Tensor, w: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(w), torch.empty_like(v)


@torch.library.custom_op("spannorm_cpu::expert_swiglu", mutates_args=())
def _forward(x: Tensor, w: Tensor, v: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (silu(gate) * up, gate = x w^T, up = x v^T), each [rows, hidden]."""
    hidden, gate, up = _empty_products(x, w)
    sizes = counts.long().tolist()
    by_rows = (tensor.split(sizes) for tensor in (x, hidden, gate, up))
    for rows, product, left, right, matrix, other in zip(*by_rows, w.mT.unbind(), v.mT.unbind(), strict=True):
        torch.mm(rows, matrix, out=left)
        torch.mm(rows, other, out=right)
        torch.mul(F.silu(left), right, out=product)
    return hidden, gate, up


@torch.library.custom_op("spannorm_cpu::expert_swiglu_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, w: Tensor, v: Tensor, counts: Tensor, gate: Tensor, up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients in x, w and v."""
    results = grad_x, grad_w, grad_v = _empty_gradients(grad, x, w, v)
    sizes = counts.long().tolist()
    by_rows = (tensor.split(sizes) for tensor in (grad, x, gate, up, grad_x))
    by_expert = (tensor.unbind() for tensor in (w, v, grad_w, grad_v))
    for grads, rows, left, right, of_rows, matrix, other, of_matrix, of_other in zip(*by_rows, *by_expert, strict=True):
        of_left = torch.ops.aten.silu_backward(grads * right, left)
        of_right = F.silu(left).mul_(grads)
        torch.mm(of_left, matrix, out=of_rows)
        torch.addmm(of_rows, of_right, other, out=of_rows)
        # Experts without rows get zeros, not None: under sharding all ranks must take part in the same gradients.
        torch.mm(of_left.t(), rows, out=of_matrix)
        torch.mm(of_right.t(), rows, out=of_other)
    return results


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    _, gate, up = output
    ctx.save_for_backward(*inputs, gate, up)
    ctx.set_materialize_grads(False)  # gate and up get none


def _gradient(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    x, w, v, counts, gate, up = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return *_backward(grad, x, w, v, counts, gate, up), None
    needed = ctx.needs_input_grad[:3]
    return *differentiable_gradients(lambda x, w, v: LOOP.swiglu(x, w, v, counts), (x, w, v), needed, grad), None


_forward.register_fake(_empty_products)
_backward.register_fake(_empty_gradients)
_forward.register_autograd(_gradient, setup_context=_save)


def _fused_swiglu(x: Tensor, w: Tensor, v: Tensor, counts: Tensor) -> Tensor:
    if not torch.is_grad_enabled():  # in inference LOOP takes care that a token does not depend on others
        return LOOP.swiglu(x, w, v, counts)
    hidden: Tensor = _forward(x, w, v, counts)[0]
    return hidden


FUSED_LOOP = LOOP._replace(swiglu=_fused_swiglu)
"""The fastest on a CPU."""
