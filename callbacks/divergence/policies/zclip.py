"""Clip the gradient where its norm is far above its moving average: ZClip (2504.02507)."""

import math
from typing import Any

from callbacks.divergence.policies.base import Policy, Step
from callbacks.divergence.policies.skip import Skip
from core.errors import require

FIELD = "callbacks.divergence.policy_options"


class ZClip(Policy):
    """g -> mean + z_max^2 / z * std where z = (g - mean) / std exceeds z_max; mean and variance are moving averages of
    the clipped norms (2504.02507, eq. 5 to 9). Steps that are not finite are skipped.

    Args:
        z_max: z-score above which is clipped.
        decay: of the moving averages, per step.
        warmup_steps: steps that the first mean and variance are taken over; nothing is clipped until then.
        max_in_a_row: steps that are not finite, after which the run stops.
    """

    def __init__(self, z_max: float = 2.5, decay: float = 0.97, warmup_steps: int = 25, max_in_a_row: int = 10) -> None:
        require(z_max > 0, f"{FIELD}.z_max", z_max, "a number > 0")
        require(0 < decay < 1, f"{FIELD}.decay", decay, "a number in (0, 1)")
        require(warmup_steps >= 2, f"{FIELD}.warmup_steps", warmup_steps, "an integer >= 2")
        self.z_max, self.decay, self.warmup_steps = z_max, decay, warmup_steps
        self.skips = Skip(max_in_a_row)
        self.first: list[float] = []
        self.mean = self.variance = 0.0

    def act(self, step: Step) -> str | None:
        norm = step.statistics.total_norm
        if not (math.isfinite(norm) and math.isfinite(step.loss)):
            return self.skips.act(step)
        self.skips.in_a_row = 0
        target = self.target(norm)
        if target < norm:
            step.scale_gradients(target / norm)
        if not step.alarms:
            return None
        return f"clipped the gradient norm to {target:.3g}" if target < norm else "went on"

    def target(self, norm: float) -> float:
        """Return what the norm is to be clipped to, and take it into the averages."""
        if len(self.first) < self.warmup_steps:
            self.first.append(norm)
            self.mean = sum(self.first) / len(self.first)
            self.variance = sum((x - self.mean) ** 2 for x in self.first) / len(self.first)
            return norm
        std = max(math.sqrt(self.variance), 1e-12)
        z = (norm - self.mean) / std
        target = self.mean + self.z_max**2 / z * std if z > self.z_max else norm
        self.mean = self.decay * self.mean + (1 - self.decay) * target
        self.variance = self.decay * self.variance + (1 - self.decay) * (target - self.mean) ** 2
        return target

    def state_dict(self) -> dict[str, Any]:
        averages = {"first": list(self.first), "mean": self.mean, "variance": self.variance}
        return {**averages, "skips": self.skips.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first, self.mean, self.variance = list(state["first"]), state["mean"], state["variance"]
        self.skips.load_state_dict(state["skips"])
