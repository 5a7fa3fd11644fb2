"""What becomes of activations and gradients on their way through a freshly initialized model."""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.transformer import Block, Transformer


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


def measure(model: Transformer, tokens: Tensor) -> list[BlockSignal]:
    """One forward and one backward pass; the model is left as it was, without gradients.

    Args:
        model: neither compiled nor with activation checkpointing: hooks would not see every block once.
        tokens: ids [batch, seq + 1]; the loss is the mean cross-entropy of the following token.
    """
    befores: list[Tensor] = []
    afters: list[Any] = []
    branches: dict[str, list[float]] = {"attn": [], "ffn": []}

    def keep_state(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        befores.append(_side_by_side(inputs[0]).detach())
        afters.append(output)

    def keep_branch(name: str, output: Any) -> None:
        branches[name].append(mean_square(output[0] if isinstance(output, tuple) else output))

    blocks = [block for block in model.blocks if isinstance(block, Block)]
    with ExitStack() as hooks:
        for block in blocks:
            handles = (
                block.placement.register_forward_hook(keep_state),
                block.attn.register_forward_hook(lambda module, inputs, output: keep_branch("attn", output)),
                block.ffn.register_forward_hook(lambda module, inputs, output: keep_branch("ffn", output)),
            )
            for handle in handles:
                hooks.callback(handle.remove)
        logits, _ = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    groups: list[list[Tensor]] = []
    for block, state in zip(blocks, afters, strict=True):
        groups += [list(_streams(state)), list(block.attn.parameters()), list(block.ffn.parameters())]
    gradients = iter(torch.autograd.grad(loss, [tensor for group in groups for tensor in group], allow_unused=True))
    norms = [float(_norm([next(gradients) for _ in group])) for group in groups]

    signals = []
    for i, (before, state) in enumerate(zip(befores, afters, strict=True)):
        after = _side_by_side(state).detach()
        signals.append(
            BlockSignal(
                block=i + 1,
                variance=mean_square(after),
                attn_ratio=branches["attn"][i] / mean_square(before),
                ffn_ratio=branches["ffn"][i] / mean_square(before),
                hidden_gradient=norms[3 * i],
                attn_gradient=norms[3 * i + 1],
                ffn_gradient=norms[3 * i + 2],
                cosine=mean_cosine(after),
                effective_rank=effective_rank(after),
            )
        )
    return signals


def mean_square(x: Tensor) -> float:
    """Mean over all entries."""
    return float(x.detach().float().square().mean())


def mean_cosine(x: Tensor) -> float:
    """Mean cosine similarity over all pairs of different tokens of a sequence; x [batch, seq, dim], seq >= 2."""
    unit = F.normalize(x.float(), dim=-1)
    seq = x.size(1)
    return float(((unit.sum(1).square().sum(-1) - seq) / (seq * (seq - 1))).mean())


def effective_rank(x: Tensor) -> float:
    """exp of the entropy of the normalized singular values of each sequence (Roy and Vetterli 2007), averaged.

    x [batch, seq, dim] -> a number between 1 and min(seq, dim); nan where x overflowed.
    """
    if not x.isfinite().all():
        return math.nan
    x = x.double() if x.size(1) <= x.size(2) else x.double().mT
    singular = torch.linalg.eigvalsh(x @ x.mT).clamp(min=0).sqrt()  # many times faster than svdvals
    share = singular / singular.sum(-1, keepdim=True)
    return float(torch.special.entr(share).sum(-1).exp().mean())


def _streams(state: Any) -> tuple[Tensor, ...]:
    return tuple(state) if isinstance(state, tuple | list) else (state,)


def _side_by_side(state: Any) -> Tensor:
    return torch.cat(_streams(state), dim=-1)


def _norm(gradients: list[Tensor | None]) -> Tensor:
    """l2 norm over all of them; None is a tensor that the loss does not depend on."""
    return torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
