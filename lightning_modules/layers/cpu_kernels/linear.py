"""Linear layers in a training step on an AMD processor by oneDNN.

torch takes MKL, which is made for another maker's processors: there oneDNN computes large fp32 products with a weight
matrix in 0.83 to 0.9 of the time, and products of two transposed activations, as the weights' gradients are, in more.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from core.compat import onednn_linear

MIN_MULTIPLICATIONS = 100_000_000
"""Products of at least so many are worth an operator of Python's."""


def _on_amd() -> bool:
    try:
        with Path("/proc/cpuinfo").open() as file:
            return "AuthenticAMD" in file.read(1000)
    except OSError:  # not Linux
        return False


PREFER_ONEDNN = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and _on_amd()


class Linear(nn.Linear):
    """x W^T + b. Without a bias, and with gradients, by `matmul`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out_features] of x [..., in_features]."""
        # Inference is torch's: there a token's result must not depend on how many others come with it.
        if self.bias is None and torch.is_grad_enabled():
            return matmul(x, self.weight)
        return super().forward(x)


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [..., in] W^T of weight [out, in], [..., out], by the faster library, with gradients of every order."""
    if (
        PREFER_ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.size(0) >= MIN_MULTIPLICATIONS
        and not torch.is_autocast_enabled("cpu")
        and not isinstance(weight, DTensor)
    ):
        out: Tensor = _matmul(x, weight)
        return out
    return F.linear(x, weight)


# An operator of our own around oneDNN's, which inductor takes with constant weights only, and autograd not at all. Not
# a custom_op, whose checks cost a percent of a step.
torch.library.define("spannorm_cpu::matmul", "(Tensor x, Tensor weight) -> Tensor")
torch.library.impl("spannorm_cpu::matmul", "cpu", onednn_linear)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    of_x, of_weight = ctx.needs_input_grad
    grad_x = matmul(grad, weight.t()) if of_x else None
    return grad_x, grad.flatten(0, -2).t() @ x.flatten(0, -2) if of_weight else None


torch.library.register_fake("spannorm_cpu::matmul", lambda x, weight: x.new_empty(*x.shape[:-1], weight.size(0)))
torch.library.register_autograd("spannorm_cpu::matmul", _gradient, setup_context=_save)
_matmul = torch.ops.spannorm_cpu.matmul.default
