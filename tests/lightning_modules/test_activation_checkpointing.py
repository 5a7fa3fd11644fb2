"""Activation checkpointing recomputes; it must not change a single bit of loss or gradient."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_modules.initialization import initialize
from lightning_modules.transformer import Transformer
from lightning_modules.trunk import Trunk
from spannorm import PLACEMENTS
from tests.support.images import make_images_model
from tests.support.models import tiny_config


def loss_and_gradients(model: Trunk, inputs: Tensor) -> list[Tensor]:
    torch.manual_seed(1)  # the router's jitter: recomputation has to draw the same noise again
    logits, router_stats = model(inputs)
    loss = logits.square().mean() + sum(stats.load_balancing_loss + stats.z_loss for stats in router_stats)
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("modality", ["language", "images"])
@pytest.mark.parametrize("ffn", ["dense", "moe"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_it_changes_neither_loss_nor_gradient(placement: str, ffn: str, modality: str) -> None:
    values = {"placement": placement, "ffn": ffn, "moe": {"num_experts": 4, "top_k": 2, "jitter": 0.1}}
    of_images = modality == "images"
    model = make_images_model(**values) if of_images else Transformer(tiny_config(**values), 32)
    initialize(model)
    config, inputs = model.config, model.example(2, 7)["images" if of_images else "tokens"]
    plain = loss_and_gradients(model, inputs)

    calls = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda *_: calls.append(1))
    model.config = replace(config, activation_checkpointing=True)
    checkpointed = loss_and_gradients(model, inputs)
    assert len(calls) == 2 * config.num_layers, "each block runs again in the backward pass"
    for expected, actual in zip(plain, checkpointed, strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize(("every", "again"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4]), (5, [5]), (6, [])])
def test_each_nth_block_runs_again(every: int, again: list[int]) -> None:
    model = Transformer(tiny_config(num_layers=5, activation_checkpointing=True, activation_checkpoint_every=every), 32)
    initialize(model)
    calls: list[int] = []
    for number, block in enumerate(model.blocks, start=1):
        block.attn.register_forward_hook(lambda *_, number=number: calls.append(number))
    loss_and_gradients(model, torch.randint(32, (2, 8)))
    assert sorted(calls) == sorted([1, 2, 3, 4, 5, *again])
