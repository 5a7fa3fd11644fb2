"""Changes to an optimizer that hold for a single step and leave no trace."""

from typing import Any

import torch
from torch.optim import Optimizer


class StepOverride:
    """Changes the optimizer in `on_before_optimizer_step`, and undoes it as soon as the optimizer has stepped, before a
    scheduler or a checkpoint sees its groups.

    Args:
        optimizer: torch's own, not Lightning's wrapper.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._before: list[dict[str, Any]] = []
        optimizer.register_step_post_hook(self._undo)

    def skip(self) -> None:
        """Let the step change nothing: no weight, no moment, no decay.

        The groups lose their parameters rather than these their gradients, so that whoever looks at gradients later in
        the step still can. In their place is one that has none: nobody expects an empty group.
        """
        self._remember()
        for group in self.optimizer.param_groups:
            group["params"] = [torch.nn.Parameter(torch.empty(0))]

    def scale_lr(self, factor: float) -> None:
        """Multiply the scheduled learning rate of every group with a factor."""
        self._remember()
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def _remember(self) -> None:
        self._before = self._before or [dict(group) for group in self.optimizer.param_groups]

    def _undo(self, *_: Any) -> None:
        for group, before in zip(self.optimizer.param_groups, self._before, strict=False):
            group.update(before)
        self._before = []
