"""Root mean square norm (1910.07467, eq. 4) in a few passes over memory: x / sqrt(mean(x^2) + eps) * gain.

Eager on a CPU, torch's is a dozen operators with its gradients, each a pass over tensors that are larger than the
processor's cache, and keeps x / rms besides x for the backward pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

import spannorm
from lightning_modules.layers.cpu_kernels.double_backward import differentiable_gradients


class RMSNorm(spannorm.RMSNorm):
    """The library's RMSNorm, by `rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x [..., dim], in its shape and dtype."""
        wider = torch.promote_types(x.dtype, self.weight.dtype)
        return rms_norm(x.to(wider), self.weight.to(wider), self.eps).to(x.dtype)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Return the norm of x [..., dim] with gain [dim], of one dtype; elsewhere than eager on a CPU it is torch's."""
    if (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)  # narrower ones are computed in fp32 in between
        and not torch.compiler.is_compiling()  # which fuses the operators
        and not isinstance(x, DTensor)
    ):
        normed: Tensor = _RMSNorm.apply(x, gain, eps) if torch.is_grad_enabled() else _normed(x, gain, eps)[0]
        return normed
    return F.rms_norm(x, gain.shape, gain, eps)


def _normed(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (the norm, 1 / rms of each row)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()
    return (x * inverse).mul_(gain), inverse


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        normed, inverse = _normed(x, gain, eps)
        ctx.save_for_backward(x, gain, inverse)
        ctx.eps = eps
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients in x and the gain.

        With r = 1 / rms: r (gain grad) - r^3 x (gain . (grad x)) / dim, and r (grad x) summed over rows.
        """
        x, gain, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():
            needed = ctx.needs_input_grad[:2]
            plain = lambda x, g: F.rms_norm(x, g.shape, g, ctx.eps)  # noqa: E731
            return *differentiable_gradients(plain, (x, gain), needed, grad), None
        products = grad * x
        rows = products.reshape(-1, x.size(-1))
        inner = (rows @ gain).view_as(inverse)
        grad_gain = inverse.flatten() @ rows
        along_x = inverse.pow(3).mul_(inner).div_(-x.size(-1))
        grad_x = torch.mul(grad, gain, out=products).mul_(inverse).addcmul_(x, along_x)
        return grad_x, grad_gain, None
