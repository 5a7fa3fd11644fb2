"""Measures what becomes of activations and gradients on their way through a freshly initialized model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from analysis.states import BlockView, effective_rank, mean_cosine, mean_square, streams, watching
from lightning_modules.trunk import Batch, Trunk


@dataclass(frozen=True)
class BlockSignal:
    """One block's figures. Variances are mean squares over batch, positions and features.

    The hidden state is what the placement hands on (before a final norm). Where it carries several streams, they are
    taken side by side, as one vector: the variance is then their mean, the gradient norm that of both together.

    Attributes:
        block: counted from 1.
        variance: of the hidden state after the block.
        attn_ratio: variance of attention's output over that of the hidden state before the block.
        ffn_ratio: likewise of the FFN's output.
        hidden_gradient: l2 norm of the loss's gradient with respect to the hidden state after the block.
        attn_gradient: l2 norm of the gradient of attention's parameters.
        ffn_gradient: likewise of the FFN's, router and experts included.
        cosine: mean cosine similarity between two tokens of a sequence, after the block.
        effective_rank: of the hidden state of a sequence, [seq, dim]; at most the smaller of the two.
    """

    block: int
    variance: float
    attn_ratio: float
    ffn_ratio: float
    hidden_gradient: float
    attn_gradient: float
    ffn_gradient: float
    cosine: float
    effective_rank: float


def measure(model: Trunk, batch: Batch) -> list[BlockSignal]:
    """Measure one forward and one backward pass; the model is left as it was, without gradients.

    Args:
        model: neither compiled nor with activation checkpointing: hooks would not see every block once.
        batch: as the model reads it.
    """
    views: list[BlockView] = []
    with watching(model, views.append):
        loss = model.loss(batch)

    groups: list[list[Tensor]] = []
    for view in views:
        groups += [list(streams(view.state)), list(view.block.attn.parameters()), list(view.block.ffn.parameters())]
    gradients = iter(torch.autograd.grad(loss, [tensor for group in groups for tensor in group], allow_unused=True))
    norms = [float(_norm([next(gradients) for _ in group])) for group in groups]

    signals = []
    for i, view in enumerate(views):
        before, after = mean_square(view.before), view.after
        signals.append(
            BlockSignal(
                block=view.number,
                variance=float(mean_square(after)),
                attn_ratio=float(mean_square(view.attn_out) / before),
                ffn_ratio=float(mean_square(view.ffn_out) / before),
                hidden_gradient=norms[3 * i],
                attn_gradient=norms[3 * i + 1],
                ffn_gradient=norms[3 * i + 2],
                cosine=float(mean_cosine(after)),
                effective_rank=float(effective_rank(after)),
            )
        )
    return signals


def _norm(gradients: list[Tensor | None]) -> Tensor:
    """Return the l2 norm over all tensors; None is one that the loss does not depend on."""
    return torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
