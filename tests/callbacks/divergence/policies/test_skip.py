"""What policy=skip does about trouble that lasts, with the real detectors."""

import random
from typing import Any

import torch

from callbacks.divergence.detectors import CLIMB, LOSS_SPIKE, Detectors
from callbacks.divergence.policies.base import Step
from callbacks.divergence.policies.skip import Skip
from callbacks.divergence.step_override import StepOverride


def act_on(losses: list[float]) -> list[tuple[int, list[str], str]]:
    """(index, kinds of alarm, what was done) of the steps that were worth an event."""
    detectors, policy, found = Detectors(7.0, 8.0, 6.0), Skip(max_in_a_row=3), []
    step_override = StepOverride(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))
    facts: Any = {
        "trainer": None,
        "pl_module": None,
        "statistics": None,
        "step_override": step_override,
        "detectors": detectors,
    }
    for index, loss in enumerate(losses):
        before = detectors.state_dict()
        alarms = detectors.update(loss, gradient_norm=1.0)
        done = policy.act(Step(number=index + 1, loss=loss, alarms=alarms, detectors_before=before, **facts))
        step_override.optimizer.step()
        if done is not None:
            found.append((index, [alarm.kind for alarm in alarms], done))
    return found


def test_a_lasting_climb_is_reported_and_the_run_goes_on() -> None:
    noise = random.Random(0)
    levels = [2.0] * 60 + [2.35] * 100
    losses = [level + noise.gauss(0, 0.03) for level in levels]
    found = act_on(losses)
    assert 1 <= len(found) <= 2, "the level that was reached is the usual one from then on"
    for index, kinds, done in found:
        assert 60 < index < 60 + 25
        assert (kinds, done) == ([CLIMB], "went on")


def test_a_spike_after_a_climb_is_still_skipped() -> None:
    noise = random.Random(0)
    losses = [level + noise.gauss(0, 0.03) for level in [2.0] * 60 + [2.35] * 40]
    assert act_on([*losses, 9.0, 9.0, 2.35])[-2:] == [
        (100, [LOSS_SPIKE], "skipped the step (1 in a row)"),
        (101, [LOSS_SPIKE], "skipped the step (2 in a row)"),
    ]
