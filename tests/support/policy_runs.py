"""A run of a policy on a made-up loss."""

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from callbacks.divergence.detectors import CLIMB, LOSS_SPIKE, Alarm, Detectors
from callbacks.divergence.policies.base import Policy, Step
from callbacks.divergence.step_override import StepOverride
from callbacks.statistics import GradientStatistics, Group

SPIKE, DRIFT = Alarm(LOSS_SPIKE, 9.0, 2.0, 20.0), Alarm(CLIMB, 3.0, 2.0, 9.0)


class Run:
    """A model of two tensors that a policy watches over, without a Trainer."""

    def __init__(self, policy: Policy) -> None:
        torch.manual_seed(0)
        self.policy, self.model = policy, nn.Linear(3, 2)
        self.model.device = torch.device("cpu")  # type: ignore[assignment]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.step_override, self.detectors, self.number = StepOverride(self.optimizer), Detectors(7.0, 8.0, 6.0), 0

    def step(self, *alarms: Alarm, gradients: tuple[float, float] = (1.0, 1.0)) -> str | None:
        """One step whose gradients have these norms; returns what the policy said."""
        self.number += 1
        said: list[str | None] = []

        def closure() -> float:
            for parameter, norm in zip(self.model.parameters(), gradients, strict=True):
                parameter.grad = torch.full_like(parameter, norm / math.sqrt(parameter.numel()))
            norms = list(gradients)
            statistics: Any = GradientStatistics(
                (Group(0, "head"), Group(0, "norm")), norms, [0.0, 0.0], math.hypot(*norms), self.number, [], []
            )
            before = self.detectors.state_dict()
            self.detectors.update(2.0, statistics.total_norm)
            facts: Any = {
                "trainer": SimpleNamespace(callbacks=[], ckpt_path=None),
                "pl_module": self.model,
                "step_override": self.step_override,
            }
            figures: Any = {"number": self.number, "loss": 2.0, "statistics": statistics, "alarms": alarms}
            said.append(self.policy.act(Step(**facts, **figures, detectors=self.detectors, detectors_before=before)))
            return 0.0

        self.optimizer.step(closure)  # type: ignore[arg-type]
        return said[0]

    @property
    def norms(self) -> list[float]:
        """Of the gradients, as the policy has left them."""
        return [float(parameter.grad.norm()) for parameter in self.model.parameters()]  # type: ignore[union-attr]

    def weights(self) -> list[list[float]]:
        return [parameter.detach().flatten().tolist() for parameter in self.model.parameters()]


def resumed(policy: Policy, anew: Policy) -> Policy:
    anew.load_state_dict(policy.state_dict())
    return anew
