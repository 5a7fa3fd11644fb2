"""The base class of policies: one sees each optimizer step before the weights move, and may change it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch import Tensor

from callbacks.divergence.detectors import Alarm, Detectors
from callbacks.divergence.policies.snapshot import local
from callbacks.divergence.step_override import StepOverride
from callbacks.statistics import GradientStatistics
from core.compat import foreach_scale_


@dataclass
class Step:
    """An optimizer step whose gradients are there and whose update is not. All processes see the same figures.

    Attributes:
        number: counted from 1.
        loss: over all batches and processes of the step, nats per token, auxiliary losses included.
        statistics: of the gradients, before clipping.
        alarms: what the detectors say; empty on a healthy step.
        detectors: they know of this step.
        detectors_before: their state before it.
    """

    trainer: L.Trainer
    pl_module: L.LightningModule
    step_override: StepOverride
    number: int
    loss: float
    statistics: GradientStatistics
    alarms: Sequence[Alarm]
    detectors: Detectors
    detectors_before: dict[str, Any]

    def skip(self) -> None:
        """Leave weights and optimizer state as they are; the detectors forget the step."""
        self.step_override.skip()
        self.detectors.load_state_dict(self.detectors_before)

    def scale_gradients(self, factor: float | Tensor) -> None:
        """Multiply all gradients with one number, or each with its own: [parameters that have a gradient]."""
        gradients = [local(p.grad) for p in self.pl_module.parameters() if p.grad is not None]
        foreach_scale_(gradients, factor if isinstance(factor, float) else factor.unbind())


class GiveUp(Exception):
    """The policy sees no way to go on; the message says why."""


class Policy:
    """Decides what is done about alarms. Decisions follow from the Step alone, so that all processes decide alike."""

    def check_run(self, trainer: L.Trainer) -> None:
        """Refuse, before training, a Trainer under which the policy could not do what it is for.

        Raises:
            ConfigError: says what is missing.
        """

    def act(self, step: Step) -> str | None:
        """Decide about a step, and act; called before every update of the optimizer.

        Returns:
            What was done about an alarm, in words; None: nothing worth an event.

        Raises:
            GiveUp: the run is to end.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run has to know, as plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
