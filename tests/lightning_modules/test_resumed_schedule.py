"""What a resumption says of the learning rate: the rates are those of the schedules, and the advice can be followed."""

import math
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from lightning_modules.config import OptimConfig
from lightning_modules.optim import make_schedule
from lightning_modules.resumed_schedule import describe_change


def described(step: int, now: int, before: int, **options: Any) -> str | None:
    """Of a checkpoint of `step`, saved in a run of `before` steps that goes on as one of `now`."""
    config = OptimConfig(lr=1.0, warmup_steps=2, **options)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = LambdaLR(optimizer, make_schedule(config, now))
    scheduler.last_epoch = step
    optimizer.param_groups[0]["lr"] = make_schedule(config, before)(step)
    return describe_change(config, scheduler, now, before)


def test_fields_are_named_so_that_they_can_be_copied() -> None:
    line = described(4, now=12, before=8)
    assert line is not None
    assert "; trainer.max_steps=8 with the same optim settings keeps the curve; " in line
    assert "Trainer." not in line


@pytest.mark.parametrize("step", range(1, 10))
def test_the_advice_on_wsd_is_where_the_rate_does_not_rise(step: int) -> None:
    """Of 10 steps the last two decay: from step 8 on a longer run goes on at the peak, from step 9 it rises."""
    line = described(step, now=20, before=10, schedule="wsd")
    assert line is not None
    assert ("a checkpoint of step 8 or before, where the decay begins" in line) == (step == 9)
    rates = [make_schedule(OptimConfig(warmup_steps=2, schedule="wsd"), 10)(step)]
    rates.append(make_schedule(OptimConfig(warmup_steps=2, schedule="wsd"), 20)(step + 1))
    assert f"it is {rates[0]:.3g} at step {step + 1}, {rates[1]:.3g} at step {step + 2}" in line


@pytest.mark.parametrize(("step", "now", "before"), [(0, 20, 10), (5, 10, 10)])
def test_nothing_is_said_where_nothing_changes(step: int, now: int, before: int) -> None:
    assert described(step, now, before) is None
    assert described(step, now, before, schedule="constant") is None


def test_a_run_of_epochs_is_not_told_to_set_its_steps() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=2)
    scheduler = LambdaLR(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), make_schedule(config, 12))
    scheduler.last_epoch = 8
    scheduler.optimizer.param_groups[0]["lr"] = make_schedule(config, 9)(8)
    line = describe_change(config, scheduler, 12, 9, by_steps=False)
    assert line is not None
    assert "goes by the number of steps that trainer.max_epochs makes, 9 before and 12 now" in line
    assert "a run of 9 steps with the same optim settings keeps the curve" in line
    assert "begin with the final trainer.max_epochs, or" in line
    assert "max_steps" not in line


def test_a_length_that_the_checkpoint_does_not_say_is_found_by_the_rate() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=2)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = LambdaLR(optimizer, make_schedule(config, 12))
    scheduler.last_epoch = 8
    for before, is_said in ((8, True), (12, False)):
        optimizer.param_groups[0]["lr"] = make_schedule(config, before)(8)
        line = describe_change(config, scheduler, 12, None)
        assert (line is not None) == is_said
        if line is not None:
            assert "optim.schedule=cosine over 12 steps is not the checkpoint's schedule, which does not say" in line
            assert "; the same optim settings and the same number of steps as before keep the curve" in line
    assert describe_change(OptimConfig(schedule="constant"), scheduler, math.inf, math.inf) is None
