"""A skipped step changes nothing, bit for bit, and a cut learning rate is gone before a scheduler sees it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler

from callbacks.divergence.step_override import StepOverride

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda groups: AdamW(groups, lr=0.1, weight_decay=0.5),
    "fused AdamW": lambda groups: AdamW(groups, lr=0.1, weight_decay=0.5, fused=True),
    "SGD": lambda groups: SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.5),
}


def make(name: str) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    return model, OPTIMIZERS[name]([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.01}])


def step(model: nn.Module, optimizer: Optimizer, number: int, change: Callable[[], None] = lambda: None) -> None:
    """As Lightning does it: the closure computes gradients, and callbacks come before the update."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
        loss = model(x).square().mean()
        loss.backward()
        change()
        return loss

    optimizer.step(closure)


def state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_leaves_no_trace(name: str) -> None:
    model, optimizer = make(name)
    step_override = StepOverride(optimizer)
    step(model, optimizer, 1)
    before = state(model, optimizer)
    step(model, optimizer, 2, step_override.skip)
    assert model.weight.grad is not None
    assert bool(model.weight.grad.any()), "who looks at gradients still finds them"
    torch.testing.assert_close(state(model, optimizer), before, rtol=0, atol=0)
    step(model, optimizer, 3)

    without, its_optimizer = make(name)
    for number in (1, 3):
        step(without, its_optimizer, number)
    torch.testing.assert_close(state(model, optimizer), state(without, its_optimizer), rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_learning_rate_is_cut_for_one_step(name: str) -> None:
    model, optimizer = make(name)
    step_override, scheduler = (
        StepOverride(optimizer),
        ExponentialLR(optimizer, 0.5),
    )  # multiplies what it finds in the group
    without, its_optimizer = make(name)
    its_scheduler: LRScheduler = ExponentialLR(its_optimizer, 0.5)

    def by_hand() -> None:
        for group in its_optimizer.param_groups:
            group["lr"] *= 0.1

    for number in (1, 2, 3):
        step(model, optimizer, number, (lambda: step_override.scale_lr(0.1)) if number == 2 else lambda: None)
        step(without, its_optimizer, number, by_hand if number == 2 else lambda: None)
        for group, lr in zip(its_optimizer.param_groups, (0.1, 0.01), strict=True):
            group["lr"] = lr * 0.5 ** (number - 1)
        scheduler.step()
        its_scheduler.step()
    torch.testing.assert_close(state(model, optimizer), state(without, its_optimizer), rtol=0, atol=0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1 / 8, 0.01 / 8]
