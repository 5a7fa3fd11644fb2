"""Sees where the routers of a mixture send the tokens of a batch, and keeps an expert from being chosen."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from analysis.anatomy.forward import run
from analysis.anatomy.held_out import Batch
from lightning_modules.layers.moe import MoE
from lightning_modules.trunk import Trunk

NO_MIXTURE = "it has no mixture of experts"


def chosen_experts(model: Trunk, batch: Batch) -> list[Tensor]:
    """Return the experts of every token at each mixture, in order, each int64 [batch x seq, top_k]; -1 stands for the
    choice among what are no numbers.
    """
    chosen: list[Tensor] = []

    def see(module: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Any]) -> None:
        weights, experts, _ = output
        chosen.append(experts.where(weights.isfinite(), -1).cpu())

    with ExitStack() as hooks:
        for mixture in model.mixtures().values():
            hooks.callback(mixture.router.register_forward_hook(see).remove)
        run(model, batch)
    return chosen


def count(places: Tensor, size: int) -> Tensor:
    """Return how often each place from 0 to size - 1 occurs, float64 [size]; nan for all, where one is negative."""
    if (places < 0).any():
        return torch.full((size,), math.nan, dtype=torch.float64)
    return places.flatten().bincount(minlength=size).double()


@contextmanager
def without_expert(mixture: MoE, expert: int) -> Iterator[None]:
    """Let a mixture choose, within the context, among the other experts, as if it did not have this one."""

    def mask(module: Any, inputs: tuple[Any, ...], logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor([expert], device=logits.device), -math.inf)

    router = mixture.router
    bias = router.expert_bias  # which is added to the scores before experts are chosen, and would bring it back
    kept = None if bias is None else bias[expert].clone()
    handle = router.layer.register_forward_hook(mask)
    try:
        if bias is not None:
            bias[expert] = -math.inf
        yield
    finally:
        handle.remove()
        if bias is not None and kept is not None:
            bias[expert] = kept


def mixture_note(model: Trunk) -> tuple[str, ...]:
    """Return a note that says which blocks the mixtures are, where they are not all."""
    blocks = list(model.mixtures())
    if len(blocks) == len(model.blocks):
        return ()
    return (f"Mixtures are counted from 1; they are blocks {', '.join(map(str, blocks))}.",)
