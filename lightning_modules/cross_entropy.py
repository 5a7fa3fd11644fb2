"""Cross-entropy from the hidden states, whose logits never exist all at once."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LARGE_VOCABULARY = 4096
"""A vocabulary from here on makes a batch's logits what needs the most memory."""

CHUNK = {"cpu": 512}
"""Tokens whose logits exist at a time, by kind of device; as fast as all at once (benchmarks/costs.py)."""
CHUNK_ELSEWHERE = 4096

Product = Callable[[Tensor, Tensor], Tensor]


class Losses(NamedTuple):
    """Losses in nats per token.

    Attributes:
        mean: scalar, with a gradient.
        by_token: [tokens], fp32, without.
    """

    mean: Tensor
    by_token: Tensor


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, compiled: bool = False, product: Product = F.linear
) -> Losses:
    """Return the losses of logits `hidden @ weight.T`, computed in autocast's precision, if on, and summed in fp32.

    The gradients are made in the forward pass, while a chunk's logits are there, so nothing is computed twice; their
    sum over the vocabulary is what stays until the backward pass. It cannot be differentiated twice.

    Args:
        hidden: [tokens, dim].
        weight: [vocab_size, dim].
        targets: [tokens].
        compiled: whether what is between the products is compiled.
        product: computes x [tokens, in] W^T of a matrix [out, in] where gradients are wanted.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return Losses(*_LinearCrossEntropy.apply(hidden, weight, targets, torch.is_grad_enabled(), compiled, product))


def _softmax(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses [tokens] of logits [tokens, vocab_size] and target [tokens, 1], and the logits' gradient."""
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    losses = -log_p.gather(1, target).squeeze(1)
    return losses, log_p.exp_().scatter_add_(1, target, log_p.new_full(target.shape, -1.0)).to(logits.dtype)


@cache
def _compiled_softmax() -> Any:
    return torch.compile(_softmax)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        with_gradients: bool,
        compiled: bool,
        product: Product,
    ) -> tuple[Tensor, ...]:
        softmax = _compiled_softmax() if compiled else _softmax
        weight = weight.to(hidden.dtype)
        losses = hidden.new_empty(len(targets), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if with_gradients else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if with_gradients else None
        size = CHUNK.get(hidden.device.type, CHUNK_ELSEWHERE)
        for start in range(0, len(targets), size):
            rows = slice(start, start + size)
            x, target = hidden[rows], targets[rows, None]
            # Without gradients it is inference, where a token's loss must not depend on how many others there are.
            losses[rows], grad = softmax(product(x, weight) if with_gradients else x @ weight.t(), target)
            if grad_hidden is not None and grad_weight is not None:
                grad_hidden[rows] = product(grad, weight.t())
                if x.dtype == torch.float32:
                    grad_weight.addmm_(grad.t(), x)
                else:
                    grad_weight += grad.t() @ x
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        return losses.mean(), losses

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors  # of the sum
        factor, dtype = grad_mean / len(grad_hidden), grad_hidden.dtype
        return (grad_hidden * factor).to(dtype), (grad_weight * factor).to(dtype), None, None, None, None
