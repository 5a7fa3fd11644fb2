"""Reads Adam's second moments from a checkpoint: what its steps are divided by."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from torch import Tensor, nn

PREFIX = "model."
"""Stands before the names of the model's parameters in a checkpoint of the LightningModule."""


class Moment(NamedTuple):
    """Holds what Adam keeps of one parameter.

    Attributes:
        square: the moving average of its gradient's square (exp_avg_sq), on the host.
        steps: so many were taken.
        betas, eps: of its group.
        rate: its group's learning rate over `AdamState.lr`.
    """

    square: Tensor
    steps: int
    betas: tuple[float, float]
    eps: float
    rate: float


@dataclass(frozen=True)
class AdamState:
    """Holds what a checkpoint keeps of Adam.

    Attributes:
        moments: by the parameters' names in the model.
        lr: the learning rate of the next step; of the first group, where groups differ.
        peak_lr: what it is at the schedule's peak.
    """

    moments: Mapping[str, Moment]
    lr: float
    peak_lr: float

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any], model: nn.Module) -> Self | None:
        """Return the state in a checkpoint, as core.checkpoint.load gives it.

        Args:
            checkpoint: with `optimizer_states`, whose parameters go by their number in the model, or with
                `optimizer_0`, where they go by their names.
            model: whose parameters that need gradients all are to have a second moment.

        Returns:
            None where some have none, or none that Adam could have kept: another optimizer, no state at all, or one
            that a stranger has made up.
        """
        try:
            return cls._of(checkpoint, model)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError):
            return None

    @classmethod
    def _of(cls, checkpoint: Mapping[str, Any], model: nn.Module) -> Self | None:
        states = checkpoint.get("optimizer_states") or [checkpoint.get("optimizer_0", {})]
        parameters = dict(model.named_parameters())
        name_of: dict[int | str, str] = {
            **dict(enumerate(parameters)),
            **{f"{PREFIX}{name}": name for name in parameters},
        }
        groups = states[0].get("param_groups", [])
        moments: dict[str, Moment] = {}
        for group in groups:
            # A schedule multiplies all rates alike, and they may all be 0 at its end.
            rate = _peak(group) / _peak(groups[0]) if _peak(groups[0]) else 1.0
            for key in group["params"]:
                kept = states[0]["state"].get(key, {})
                if {"exp_avg_sq", "step"} <= kept.keys() and key in name_of:
                    name = name_of[key]
                    moments[name] = _moment(kept, group, rate, parameters[name])
        wanted = {name for name, parameter in parameters.items() if parameter.requires_grad}
        return cls(moments, _number(groups[0]["lr"]), _peak(groups[0])) if wanted and wanted <= moments.keys() else None

    @property
    def beta1(self) -> float:
        """Return the decay of the first moment."""
        return next(iter(self.moments.values())).betas[0]

    def threshold(self, lr: float) -> float:
        """Return the preconditioned sharpness above which Adam's steps of this rate diverge: 2207.14484, eq. 3.

        With the moments of squares held fast, its steps on a parabola are those of gradient descent with an average of
        gradients, and stable below (2 + 2 beta1) / ((1 - beta1) lr): 38 / lr with beta1 = 0.9.
        """
        return (2 + 2 * self.beta1) / ((1 - self.beta1) * lr)

    def scales(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return P^(-1/2) by name: what the step on these gradients goes by on both sides of the Hessian.

        P = (1 - beta1^t) (sqrt(v / (1 - beta2^t)) + eps) is what that step divides the average of gradients by
        (2207.14484, section 2), with v the average of squares once these gradients are in it; here over the rate of
        the parameter's group. What a text has that training had not for long is thereby in P as well.
        """
        scales = {}
        for name, gradient in gradients.items():
            square, steps, (beta1, beta2), eps, rate = self.moments[name]
            now = beta2 * square.to(gradient.device, gradient.dtype) + (1 - beta2) * gradient.square()
            divisor = (1 - beta1 ** (steps + 1)) * ((now / (1 - beta2 ** (steps + 1))).sqrt() + eps)
            scales[name] = (rate / divisor).sqrt()
        return scales


def _peak(group: Mapping[str, Any]) -> float:
    return _number(group.get("initial_lr", group["lr"]))


def _moment(kept: Mapping[str, Any], group: Mapping[str, Any], rate: float, parameter: Tensor) -> Moment:
    """Return what is kept of a parameter; raises ValueError where Adam could not have kept it."""
    square, steps = kept["exp_avg_sq"], int(_number(kept["step"]))
    beta1, beta2 = map(_number, group["betas"])
    if square.shape != parameter.shape or not square.is_floating_point() or max(beta1, beta2) >= 1:
        raise ValueError("no second moment of this parameter")
    return Moment(square, steps, (beta1, beta2), _number(group["eps"]), rate)


def _number(value: Any) -> float:
    """Return a number that has to be finite and not negative, as all are that Adam goes by."""
    number = float(value)
    if isinstance(value, str) or not 0 <= number < math.inf:
        raise ValueError("no such number")
    return number
