"""Lion (2302.06675, algorithm 2): steps of one size in each entry, by the sign of an interpolated momentum."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from lightning_modules.decayed_step import decay_and_add


class Lion(torch.optim.Optimizer):
    """Keeps one moment: c = beta1 m + (1 - beta1) g; w = (1 - lr weight_decay) w - lr sign(c); m = beta2 m + (1 -
    beta2) g.

    Args:
        params: parameters or groups of them.
        lr: learning rate, of a third to a tenth of AdamW's.
        betas: of the step, and of what is kept.
        weight_decay: decoupled; as much larger than AdamW's as the rate is smaller.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; the closure, where there is one, computes the loss and its gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                moment = state["exp_avg"]
                direction = moment.lerp(parameter.grad, 1 - beta1).sign_()
                decay_and_add(parameter, group["lr"] * group["weight_decay"], direction, -group["lr"])
                moment.lerp_(parameter.grad, 1 - beta2)
        return loss
