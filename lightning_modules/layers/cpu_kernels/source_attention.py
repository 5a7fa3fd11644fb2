"""Attention over the sources of a token (2603.15031) in a few passes over memory, forward and back.

Of plain operators, what lies between sources and mean is computed again for the backward pass, out of place, and its
gradients add up in further passes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import spannorm
from lightning_modules.layers.cpu_kernels.double_backward import differentiable_gradients


class SourceAttention(spannorm.SourceAttention):
    """The library's SourceAttention, by gradients that are written out."""

    def forward(self, sources: tuple[Tensor, ...]) -> Tensor:
        """Return the weighted mean of the sources, of their shape and dtype."""
        query, gain = self.query, self.weight
        plain = (
            torch.compiler.is_compiling()
            or any(t.device.type != "cpu" or t.dtype not in (torch.float32, torch.float64) for t in (query, *sources))
            or isinstance(query, DTensor)
        )
        if plain:
            return super().forward(sources)
        mean: Tensor = _SourceAttention.apply(self, query, gain, *sources)
        return mean


class _SourceAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: SourceAttention, query: Tensor, gain: Tensor, *sources: Tensor) -> Tensor:
        rows = [source.reshape(-1, source.size(-1)) for source in sources]
        direction = query[0] * gain
        norms = torch.stack([torch.linalg.vector_norm(row, dim=-1) for row in rows])
        inverses = norms.square_().div_(rows[0].size(-1)).add_(module.eps).rsqrt_()
        logits = torch.stack([torch.linalg.vecdot(row, direction) for row in rows]).mul_(inverses)
        weights = logits.t().softmax(-1).t().contiguous()  # as the library has it, to the bit for each token
        mean = rows[0] * weights[0].unsqueeze(-1)
        for weight, row in zip(weights[1:], rows[1:], strict=True):
            mean.addcmul_(row, weight.unsqueeze(-1))
        ctx.module = module
        ctx.save_for_backward(query, gain, inverses, logits, weights, *sources)
        return mean.view_as(sources[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients in query, gain and sources.

        With r = 1 / rms(v), u = query gain, s = r (u . v), a = softmax(s), of each source:
        ds = a (grad . v - sum_j a_j grad . v_j), and in v: a grad + ds r u - ds s r^2 v / dim.
        """
        query, gain, inverses, logits, weights, *sources = ctx.saved_tensors
        if torch.is_grad_enabled():
            operands, needed = (query, gain, *sources), ctx.needs_input_grad[1:]
            return None, *differentiable_gradients(ctx.module.mean, operands, needed, grad)
        dim = grad.size(-1)
        rows, grad = [source.reshape(-1, dim) for source in sources], grad.reshape(-1, dim)
        direction = query[0] * gain
        inner = torch.stack([torch.linalg.vecdot(grad, row) for row in rows])
        of_logits = weights * (inner - (weights * inner).sum(0))
        along_direction = of_logits * inverses
        along_source = along_direction * logits * inverses / -dim
        of_direction = torch.zeros_like(direction)
        of_sources = []
        for row, weight, scale, share in zip(rows, weights, along_direction, along_source, strict=True):
            of_direction.addmv_(row.mT, scale)
            of_row = grad * weight.unsqueeze(-1)
            of_sources.append(of_row.addr_(scale, direction).addcmul_(row, share.unsqueeze(-1)).view_as(sources[0]))
        return None, (of_direction * gain).unsqueeze(0), of_direction * query[0], *of_sources
