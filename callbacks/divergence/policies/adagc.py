"""Clip each tensor's gradient against its own moving average: AdaGC (2502.11034)."""

import math
from typing import Any

import torch
from torch import Tensor

from callbacks.divergence.policies.base import Policy, Step
from callbacks.divergence.policies.skip import Skip
from callbacks.statistics import norms
from core.errors import require

FIELD = "callbacks.divergence.policy_options"


class AdaGC(Policy):
    """Clips each tensor's norm to `ratio` times the moving average of its clipped norms (2502.11034, algorithm 1).

    In the first steps the gradient as a whole is clipped to `warmup_norm`, and the averages start as the least norm
    seen; one of exactly zero, as behind a gate that starts closed, does not count, or its tensor would stay clipped to
    zero. Steps that are not finite are skipped. Nothing waits for the device.

    Args:
        ratio: lambda_rel.
        decay: beta, of the moving averages.
        warmup_steps: T_start.
        warmup_norm: lambda_abs.
        max_in_a_row: steps that are not finite, after which the run stops.
    """

    def __init__(
        self,
        ratio: float = 1.05,
        decay: float = 0.98,
        warmup_steps: int = 100,
        warmup_norm: float = 1.0,
        max_in_a_row: int = 10,
    ) -> None:
        require(ratio > 0, f"{FIELD}.ratio", ratio, "a number > 0")
        require(0 < decay < 1, f"{FIELD}.decay", decay, "a number in (0, 1)")
        require(warmup_steps >= 1, f"{FIELD}.warmup_steps", warmup_steps, "an integer >= 1")
        require(warmup_norm > 0, f"{FIELD}.warmup_norm", warmup_norm, "a number > 0")
        self.ratio, self.decay, self.warmup_steps, self.warmup_norm = ratio, decay, warmup_steps, warmup_norm
        self.skips = Skip(max_in_a_row)
        self.seen = 0
        self.averages = torch.empty(0)  # [tensors]; infinite: none yet

    def act(self, step: Step) -> str | None:
        total = step.statistics.total_norm
        if not (math.isfinite(total) and math.isfinite(step.loss)):
            return self.skips.act(step)
        self.skips.in_a_row = 0
        parameters = [p for p in step.pl_module.parameters() if p.grad is not None]
        gradients: list[Any] = [p.grad for p in parameters]
        step.scale_gradients(self.factors(norms(gradients, parameters), total))
        return "clipped each tensor" if step.alarms else None

    def factors(self, found: Tensor, total: float) -> Tensor:
        """Return what to multiply each gradient with, in (0, 1], by the gradient norms of the tensors, [tensors]."""
        known = self.averages.shape == found.shape  # another number of tensors has a gradient: they are learnt anew
        averages = self.averages.to(found) if known else torch.full_like(found, math.inf)
        self.seen += 1
        if self.seen <= self.warmup_steps:
            factors = torch.full_like(found, min(1.0, self.warmup_norm / max(total, 1e-30)))
            averages = torch.where(found > 0, torch.minimum(averages, factors * found), averages)
        else:
            factors = (self.ratio * averages / found.clamp_min(1e-30)).clamp_max(1.0)
            clipped = factors * found
            moved = torch.where(averages.isinf(), clipped, self.decay * averages + (1 - self.decay) * clipped)
            averages = torch.where(averages.isinf() & (found == 0), averages, moved)
        self.averages = averages
        return factors

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "averages": self.averages.clone(), "skips": self.skips.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.averages = state["seen"], state["averages"]
        self.skips.load_state_dict(state["skips"])
