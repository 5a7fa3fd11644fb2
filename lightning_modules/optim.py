"""The learning-rate schedules, and what an optimizer keeps, where it comes from a checkpoint."""

import copy
import itertools
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from core.errors import ConfigError, one_line, require
from core.options import accepts
from lightning_modules.argument_errors import as_config_errors, as_error_of_own
from lightning_modules.config import OptimConfig
from lightning_modules.lion import Lion
from lightning_modules.muon import Muon
from spannorm.import_path import find

Schedule = Callable[[int], float]
"""Optimizer step (0-based) -> factor on the peak learning rate."""


def number_by_parameters(
    state_dict: dict[str, Any], optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], sharded: bool
) -> dict[str, Any]:
    """Return an optimizer's state with its parameters numbered in the model's order, and listed in the groups' own.

    A ModelParallelStrategy reads the numbers; all others read the order within a group. A checkpoint therefore goes on
    under any strategy and number of processes.

    Args:
        state_dict: of the optimizer; empty where another process saves.
        optimizer: whose state it is.
        parameters: the model's, in order.
        sharded: it comes from a ModelParallelStrategy, which numbers so already but sorts its groups.
    """
    place = {id(parameter): n for n, parameter in enumerate(parameters)}
    numbers = [[place[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    groups = list(zip(state_dict.get("param_groups", ()), numbers, strict=False))
    new = {
        old: number
        for saved, mine in groups
        for old, number in zip(saved["params"], sorted(mine) if sharded else mine, strict=True)
    }
    return {
        "state": {new[old]: state for old, state in state_dict.get("state", {}).items()},
        "param_groups": [{**saved, "params": mine} for saved, mine in groups],
    }


def number_names(
    state_dict: dict[str, Any], optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return an optimizer's state that goes by parameters' names, as several processes save it in pieces, as
    `number_by_parameters` would have it.

    Args:
        state_dict: of an optimizer with the same groups.
        optimizer: which is to load it.
        parameters: the model's by name, in order.
    """
    number = {name: n for n, name in enumerate(parameters)}
    place = {id(parameter): n for n, parameter in enumerate(parameters.values())}
    groups = []
    for group in optimizer.param_groups:
        mine = [place[id(parameter)] for parameter in group["params"]]
        (saved,) = (g for g in state_dict["param_groups"] if {number[name] for name in g["params"]} == set(mine))
        groups.append({**saved, "params": mine})
    return {"state": {number[name]: state for name, state in state_dict["state"].items()}, "param_groups": groups}


def cosine(config: OptimConfig, num_steps: int) -> Schedule:
    """Return half a cosine from 1 to min_lr_ratio (1608.03983, eq. 5)."""
    span = max(1, num_steps - config.warmup_steps)

    def factor(step: int) -> float:
        progress = min(1.0, (step - config.warmup_steps) / span)
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def decay_length(config: OptimConfig, num_steps: int) -> int:
    """Return over how many steps at the end of the run `wsd` decays."""
    return max(1, round(config.decay_fraction * num_steps))


def wsd(config: OptimConfig, num_steps: int) -> Schedule:
    """Return 1 until the last decay_fraction of the run, then what leads down to min_lr_ratio.

    By decay_shape: linear, or exponential, by the same factor at each step. 2404.06395 gives the latter by a half-life
    of H steps, as 0.5^(n / H) after n of them: over N steps of decay that is min_lr_ratio = 0.5^(N / H).
    """
    length = decay_length(config, num_steps)

    def factor(step: int) -> float:
        progress = min(1.0, max(0.0, (step - (num_steps - length)) / length))
        if config.decay_shape == "exponential":
            return config.min_lr_ratio**progress
        return 1 - (1 - config.min_lr_ratio) * progress

    return factor


def constant(config: OptimConfig, num_steps: int) -> Schedule:
    """Return the peak learning rate to the end."""
    return lambda step: 1.0


SCHEDULES: dict[str, Callable[[OptimConfig, int], Schedule]] = {"cosine": cosine, "wsd": wsd, "constant": constant}
"""The schedules by name. One of your own is a function of the same arguments: `optim.schedule=my_file.my_schedule`."""
TRIED = 100_000
"""At so many steps, those of a longer run evenly apart, a schedule of the user's own is tried before training."""


def check_schedule(config: OptimConfig, num_steps: float) -> None:
    """Refuse a schedule that a run of this length cannot have.

    Args:
        config: whose schedule is known.
        num_steps: optimizer steps of the whole run; math.inf: nothing says how many.

    Raises:
        ConfigError: the run has no length, which the schedule goes by; or wsd would decay before it is warmed up, and
            jump where the warm-up ends; or one of the user's own gives at some step what is no rate.
    """
    if config.schedule == "constant":
        return
    valid = f"an integer >= 1: optim.schedule={config.schedule} goes by the run's length; constant does not"
    require(math.isfinite(num_steps), "trainer.max_steps", -1, valid)
    if config.schedule not in SCHEDULES:
        steps, schedule = int(num_steps), make_schedule(config, int(num_steps))
        for step in itertools.chain(range(0, steps, -(-steps // TRIED) or 1), [steps - 1]):
            schedule(step)
    if config.schedule == "wsd":
        steps, length = int(num_steps), decay_length(config, int(num_steps))
        valid = f"at most {steps - length}: of {steps} steps wsd decays over the last {length} (optim.decay_fraction)"
        require(config.warmup_steps <= steps - length, "optim.warmup_steps", config.warmup_steps, valid)


def describe_warmup(config: OptimConfig, num_steps: float) -> str | None:
    """Return a line where the warm-up takes up the whole run, so that the schedule behind it never begins; else None.

    Args:
        num_steps: optimizer steps of the whole run; math.inf: nothing says how many.
    """
    if config.lr == 0 or config.warmup_steps < max(num_steps, 2):
        return None
    highest = config.lr * num_steps / config.warmup_steps
    whole = f"optim.warmup_steps={config.warmup_steps} takes up the whole run of {num_steps:g} steps"
    return f"{whole}: the rate rises to {highest:.3g} of optim.lr={config.lr:g}, and never goes by {config.schedule}"


def describe_decay(config: OptimConfig, num_steps: float) -> str | None:
    """Return one line where `wsd` has a single step to decay in, which is at the peak rate still; else None.

    Args:
        num_steps: optimizer steps of the whole run; math.inf: nothing says how many.
    """
    if config.schedule != "wsd" or config.decay_fraction == 0 or not 1 < num_steps < math.inf:
        return None
    if decay_length(config, int(num_steps)) > 1:
        return None
    part = f"optim.decay_fraction={config.decay_fraction:g} of {num_steps:g} steps is one step, the first of the decay"
    return f"{part}: the rate stays at optim.lr={config.lr:g}, and never decays"


def find_schedule(config: OptimConfig) -> Callable[[OptimConfig, int], Schedule]:
    """Return what makes the schedule of `optim.schedule`.

    Raises:
        ConfigError: there is no such schedule, or none that can be imported.
    """
    with as_config_errors("optim"):
        return find("schedule", config.schedule, SCHEDULES)


def make_schedule(config: OptimConfig, num_steps: int) -> Schedule:
    """Return the configured schedule behind a linear warm-up that reaches the peak after warmup_steps.

    Raises:
        ConfigError: there is no such schedule. So does the schedule itself, if it is one of the user's own, at a step
            where it fails, or gives what is no finite number >= 0.
    """
    name = config.schedule
    make = find_schedule(config)
    with as_error_of_own("optim.schedule", name):
        after = make(config, num_steps)
    valid = "a function of an OptimConfig and the number of steps that returns a Schedule"
    require(callable(after), "optim.schedule", name, valid)

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        with as_error_of_own("optim.schedule", name):
            found = after(step)
        valid = f"one that gives finite numbers >= 0, factors on optim.lr; at step {step} it gives {str(found)[:40]}"
        number = isinstance(found, numbers.Real) and not isinstance(found, bool)
        require(number and 0 <= found < math.inf, "optim.schedule", name, valid)
        return float(found)

    return factor


SETTINGS = (
    "initial_lr",
    "betas",
    "eps",
    "weight_decay",
    "amsgrad",
    "maximize",
    "decoupled_weight_decay",
    "momentum",
    "nesterov",
    "matrix_rows",
    "update_factor",
    "ns_steps",
    "ns_coefficients",
    "ns_eps",
    "ns_dtype",
)
"""The settings of a group of parameters that the run's configuration decides, and that a checkpoint repeats."""


def group_settings(optimizer: torch.optim.Optimizer, config: OptimConfig) -> list[dict[str, Any]]:
    """Return each group's SETTINGS and options of the configuration, as `check_settings` compares them."""
    names = dict.fromkeys((*SETTINGS, *config.optimizer_options))
    return [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]


def check_settings(
    scheduler: torch.optim.lr_scheduler.LRScheduler, expected: list[dict[str, Any]], step: int, path: object
) -> None:
    """Hold an optimizer and its schedule, where they may come from a checkpoint, against what the configuration says.

    torch takes a checkpoint's settings for its own: with `maximize` in one, the loss would be driven up.

    Args:
        scheduler: its optimizer is meant.
        expected: `group_settings` from before the checkpoint.
        step: optimizer steps done.
        path: of the checkpoint, for the message.

    Raises:
        ConfigError: a setting is another one, or the schedule stands at another step.
    """
    peaks = [own["initial_lr"] for own in expected]
    _check_same("ckpt_path", path, "peak learning rates", scheduler.base_lrs, peaks)
    _check_same("ckpt_path", path, "step of the schedule", scheduler.last_epoch, step)
    _check_groups(scheduler.optimizer, expected, "ckpt_path", path)


def _check_groups(optimizer: torch.optim.Optimizer, expected: list[dict[str, Any]], field: str, path: object) -> None:
    for group, own in zip(optimizer.param_groups, expected, strict=True):
        for name, value in own.items():
            _check_same(field, path, name, group.get(name), value)


def _check_same(field: str, path: object, name: str, found: Any, value: Any) -> None:
    same = len(_numbers(found)) == len(_numbers(value)) and all(map(_is_close, _numbers(found), _numbers(value)))
    valid = f"a checkpoint whose {name} is {value!r}, as in this run; it says {str(found)[:60]}"
    require(same, field, str(path), valid)


def restore(
    optimizer: torch.optim.Optimizer, config: OptimConfig, saved: dict[str, Any], step: int, field: str, path: object
) -> None:
    """Let a new optimizer go on from what a checkpoint keeps of one, which may be anybody's.

    Args:
        optimizer: as `make_optimizer` makes it, without a schedule.
        config: which it was made from.
        saved: its state in the checkpoint; it stays as it is.
        step: optimizer steps that the checkpoint has done.
        field, path: what names the checkpoint, and its path, for the message.

    Raises:
        ConfigError: it is of other groups of parameters or other settings, of no learning rate, or `check_state`
            refuses it.
    """
    expected = group_settings(optimizer, config)
    peaks = [group["lr"] for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(copy.deepcopy(saved))  # which torch would else go on to write into
    except Exception as error:  # of many kinds
        valid = (
            f"a checkpoint of this run; its optimizer cannot be restored ({type(error).__name__}: {one_line(error)})"
        )
        raise ConfigError(field, str(path), valid) from error
    _check_groups(optimizer, expected, field, path)
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        _check_same(field, path, "initial_lr", group.get("initial_lr"), peak)
        rate: Any = group.get("lr")
        valid = f"a checkpoint whose lr is a finite number >= 0; it says {str(rate)[:60]}"
        require(accepts(float, rate) and 0 <= rate < math.inf, field, str(path), valid)
    check_state(optimizer, step, path, field)


def _numbers(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_close(found: Any, value: Any) -> bool:
    if isinstance(value, bool) or isinstance(found, bool):
        return found is value
    if not isinstance(value, int | float):  # a name, or nothing
        return type(found) is type(value) and bool(found == value)
    return isinstance(found, int | float) and math.isclose(found, value, rel_tol=1e-6)


def check_state(optimizer: torch.optim.Optimizer, step: int, path: object, field: str = "ckpt_path") -> None:
    """Hold what an optimizer keeps of each parameter against the parameter, where it may come from a checkpoint.

    torch takes any shape, and its fused kernels write beyond the end of a tensor that is too small. What an optimizer
    of the user's own keeps is unknown, and not looked at.

    Args:
        optimizer: whose state it is.
        step: optimizer steps done.
        path: of the checkpoint, for the message.
        field: what names the checkpoint, likewise.

    Raises:
        ConfigError: one of them is missing, is no tensor or of another shape than its parameter, or counts more steps
            than the run has done.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in optimizer.state:
                _check_kept(optimizer, group, parameter, step, path, field)


def _check_kept(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor, step: int, path: object, field: str
) -> None:
    state = optimizer.state[parameter]
    for name in _moments(optimizer, group, state):
        kept, shape = state.get(name), torch.Size() if name == "step" else parameter.shape
        found = f"the shape {list(kept.shape)}" if isinstance(kept, Tensor) else f"a {type(kept).__name__}"
        valid = f"a checkpoint whose optimizer has the shape {list(shape)} in {name}, where this one has {found}"
        fits = isinstance(kept, Tensor) and (kept.numel() == 1 if name == "step" else kept.shape == shape)
        require(fits, field, str(path), valid)
        if name == "step":
            count = float(kept)
            valid = f"a checkpoint whose optimizer has stepped 0 to {step} times; it says {count:g}"
            require(0 <= count <= step, field, str(path), valid)


def _moments(optimizer: torch.optim.Optimizer, group: dict[str, Any], state: dict[str, Any]) -> Iterable[str]:
    """Return what it keeps of each parameter of a group; of torch's other classes, what it says that it keeps."""
    if isinstance(optimizer, Lion):
        return ("exp_avg",)
    if isinstance(optimizer, Muon) and group.get("matrix_rows"):
        return ("momentum_buffer",)
    if isinstance(optimizer, Muon | torch.optim.AdamW):
        return ("exp_avg", "exp_avg_sq", "step")
    known = type(optimizer).__module__.startswith("torch.optim.") and not isinstance(optimizer, torch.optim.Adafactor)
    return [name for name, kept in state.items() if isinstance(kept, Tensor) and kept.numel() > 1] if known else ()
