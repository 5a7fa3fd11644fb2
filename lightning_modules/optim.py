"""AdamW's parameter groups and the learning-rate schedules."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from core.errors import lookup
from lightning_modules.config import OptimConfig
from lightning_modules.transformer import Transformer
from lightning_modules.width_scaling import width_scaling

Schedule = Callable[[int], float]
"""Optimizer step (0-based) -> factor on the peak learning rate."""


def make_optimizer(model: Transformer, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: not on embeddings, norms and biases. Fused where torch has it.

    One parameter group for everything that keeps optim.lr undecayed, which comes first, and one for each learning-rate
    factor of the width scaling.
    """
    scaling = width_scaling(model.config, config)
    factors = {id(m.weight): scaling.lr_factor(m) for m in model.matrices() if m.role != "embedding"}
    by_factor: dict[float | None, list[Tensor]] = defaultdict(list)  # in the model's order: see number_by_parameters
    for parameter in model.parameters():
        by_factor[factors.get(id(parameter))].append(parameter)
    groups: list[dict[str, Any]] = [{"params": by_factor.pop(None), "weight_decay": 0.0}]
    for factor, weights in by_factor.items():
        assert factor is not None
        groups.append({"params": weights, "lr": config.lr * factor, "weight_decay": config.weight_decay / factor})
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in model.parameters())
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
    # A fused AdamW would undo fp16's loss scaling in its step, after the clipping; Lightning refuses to clip then, in
    # any mixed precision. Without this the scaler undoes it before both.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def number_by_parameters(
    state_dict: dict[str, Any], optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]
) -> dict[str, Any]:
    """An optimizer's state with its parameters numbered in the model's order, not by their place in the groups.

    A ModelParallelStrategy writes and reads it so; all others read it by the order within a group, which is the same.
    A checkpoint therefore goes on under any strategy and number of processes.

    Args:
        state_dict: of the optimizer; empty where another process saves.
        optimizer: whose state it is.
        parameters: the model's, in order.
    """
    place = {id(parameter): n for n, parameter in enumerate(parameters)}
    groups = list(zip(state_dict.get("param_groups", ()), optimizer.param_groups, strict=False))
    pairs = [pair for saved, group in groups for pair in zip(saved["params"], group["params"], strict=True)]
    new = {number: place[id(parameter)] for number, parameter in pairs}
    return {
        "state": {new[number]: state for number, state in state_dict.get("state", {}).items()},
        "param_groups": [{**saved, "params": [new[number] for number in saved["params"]]} for saved, _ in groups],
    }


def cosine(config: OptimConfig, num_steps: int) -> Schedule:
    """Half a cosine from 1 to min_lr_ratio (1608.03983, eq. 5)."""
    span = max(1, num_steps - config.warmup_steps)

    def factor(step: int) -> float:
        progress = min(1.0, (step - config.warmup_steps) / span)
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def wsd(config: OptimConfig, num_steps: int) -> Schedule:
    """Constant, then linear to min_lr_ratio over the last decay_fraction of the run (2404.06395)."""
    length = max(1, round(config.decay_fraction * num_steps))

    def factor(step: int) -> float:
        progress = min(1.0, max(0.0, (step - (num_steps - length)) / length))
        return 1 - (1 - config.min_lr_ratio) * progress

    return factor


def constant(config: OptimConfig, num_steps: int) -> Schedule:
    """The peak learning rate to the end."""
    return lambda step: 1.0


SCHEDULES: dict[str, Callable[[OptimConfig, int], Schedule]] = {"cosine": cosine, "wsd": wsd, "constant": constant}


def make_schedule(config: OptimConfig, num_steps: int) -> Schedule:
    """The configured schedule behind a linear warm-up that reaches the peak after warmup_steps."""
    after = lookup("optim.schedule", config.schedule, SCHEDULES)(config, num_steps)

    def factor(step: int) -> float:
        return (step + 1) / config.warmup_steps if step < config.warmup_steps else after(step)

    return factor
