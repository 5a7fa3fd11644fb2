"""Root mean square norm (1910.07467, eq. 4): x / sqrt(mean(x^2) + eps) * gain over the last dimension."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.layers import by_hand


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x [..., dim] and gain [dim], of one dtype -> [..., dim]."""
    if by_hand.pays(x):
        normed: Tensor = _RMSNorm.apply(x, gain, eps)
        return normed
    return F.rms_norm(x, gain.shape, gain, eps)


class _RMSNorm(torch.autograd.Function):
    """torch's own is made of a dozen operators on a CPU, and keeps x / rms besides x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, inverse)
        ctx.eps = eps
        return (x * inverse).mul_(gain)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """r (gain grad) - r^3 x (gain . (grad x)) / dim, with r = 1 / rms; of the gain, r (grad x) summed over rows."""
        x, gain, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():
            needed = ctx.needs_input_grad[:2]
            return *by_hand.gradients(lambda x, g: F.rms_norm(x, g.shape, g, ctx.eps), (x, gain), needed, grad), None
        products = grad * x
        rows = products.reshape(-1, x.size(-1))
        inner = (rows @ gain).view_as(inverse)
        grad_gain = inverse.flatten() @ rows
        along_x = inverse.pow(3).mul_(inner).div_(-x.size(-1))
        grad_x = torch.mul(grad, gain, out=products).mul_(inverse).addcmul_(x, along_x)
        return grad_x, grad_gain, None
