"""The optimizers by name, and one of the user's own by import path: each with the model's parameters in groups.

optimizer    what it steps                                               what it keeps of each
adamw        all: AdamW (1711.05101)                                     two moments
muon         hidden matrices: Muon; all else: AdamW                      momentum; two moments
lion         all: Lion (2302.06675)                                      one moment
my.Class     all, by torch's interface of an optimizer                   its own affair
"""

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from core.compat import unscale_before_clipping
from core.errors import ConfigError, UserError, lookup, one_line, require, suggest
from core.options import accepts, check_arguments
from lightning_modules.argument_errors import as_config_errors
from lightning_modules.config import OptimConfig
from lightning_modules.depth_scaling import depth_scaling
from lightning_modules.lion import Lion
from lightning_modules.muon import COEFFICIENTS, SCALES, Muon, num_rows, width_factor
from lightning_modules.trunk import Trunk
from lightning_modules.width_scaling import width_scaling
from spannorm import Matrix
from spannorm.import_path import find
from spannorm.matrices import ROLES

Group = dict[str, Any]
Extra = Callable[[Matrix], tuple[float, Group]]
"""A matrix -> the factor on its rate by width, and what else an optimizer wants to know of its group."""

NORM = "norm"
"""The role of what is no matrix: norm gains, biases, gates."""
GROUP_FIELDS = ("lr_factor", "weight_decay")
NOT_ORTHOGONALIZED = ("embedding", "head", "router", "residual")
"""Matrices that Muon leaves to AdamW: their rows are tokens or experts, some of them rare, or a placement's few
coefficients (docs/optimizers.md)."""
PLAIN = (Tensor, torch.nn.Parameter, bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""What a checkpoint may hold of an optimizer, in dictionaries, lists and tuples: core/tensor_archive.py reads these."""
NS_DTYPES = ("bfloat16", "float32", "float64")


def make_groups(model: Trunk, config: OptimConfig, extra: Extra | None = None) -> list[Group]:
    """Return the parameters in groups of one rate and decay, each parameter once.

    Matrices decay, those of placements too; embeddings, norms, biases and scalars do not, unless `optim.groups` says
    so. First comes a group that has optim.lr itself, where there is one: it is the one that is logged.

    Args:
        model: whose parameters they are.
        config: rate, decay, their values by role, and width scaling.
        extra: of each matrix that is no embedding; None: the width scaling's factor, and nothing else.

    Raises:
        ConfigError: `optim.groups` names a role that the model has not, or says of one what it cannot have.
    """
    scaling, depth = width_scaling(model.config, config), depth_scaling(model.config, config)
    matrices = list(model.matrices())
    outside = {id(parameter) for parameter in model.outside_parameters()}
    has_eps = depth.kind != "none" and config.optimizer != "lion"
    roles: dict[int, str] = {id(matrix.weight): matrix.role for matrix in matrices}
    decayed = [matrix for matrix in matrices if matrix.role != "embedding"]
    of_decayed = {id(matrix.weight) for matrix in decayed}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in of_decayed]
    check_role_groups(config, {*roles.values(), *(NORM for p in rest if id(p) not in roles)})
    groups: dict[tuple[Any, ...], Group] = {}

    def add(parameter: Tensor, role: str, decay: float, factor: float, more: Group) -> None:
        own = config.groups.get(role, {})
        lr_factor, decay = own.get("lr_factor", 1.0), own.get("weight_decay", decay)
        lr, decay = config.lr * factor * lr_factor, decay / factor
        more = {**more, "eps": config.eps * depth.eps_factor(id(parameter) in outside)} if has_eps else more
        key = (role != "embedding" and id(parameter) in of_decayed, factor, lr_factor, decay, *more.items())
        group = groups.setdefault(key, {"params": [], "lr": lr, "weight_decay": decay, **more})
        group["params"].append(parameter)

    for parameter in rest:
        add(parameter, roles.get(id(parameter), NORM), 0.0, 1.0, {})
    for matrix in decayed:
        factor, more = extra(matrix) if extra is not None else (scaling.lr_factor(matrix), {})
        add(matrix.weight, matrix.role, config.weight_decay, factor, more)
    listed = list(groups.values())
    first = next((n for n, group in enumerate(listed) if group["lr"] == config.lr), 0)
    return [listed[first], *listed[:first], *listed[first + 1 :]]


def check_role_groups(config: OptimConfig, roles: set[str]) -> None:
    """Refuse what `optim.groups` cannot say.

    Args:
        config: with the groups.
        roles: those that the model has.

    Raises:
        ConfigError: names the field, its value and what would be valid.
    """
    for role, values in config.groups.items():
        name = f"optim.groups.{role}"
        if role not in roles:
            known = [known for known in (*ROLES, NORM) if known in roles]
            raise ConfigError(name, values, f"a role that this model's parameters have: {suggest(role, known)}")
        require(isinstance(values, dict), name, values, f"a group of fields: {', '.join(GROUP_FIELDS)}")
        for field, value in values.items():
            if field not in GROUP_FIELDS:
                raise ConfigError(f"{name}.{field}", value, suggest(str(field), GROUP_FIELDS))
            fits = accepts(float, value) and 0 <= value < math.inf
            require(fits, f"{name}.{field}", value, "a number >= 0")


def make_adamw(model: Trunk, config: OptimConfig) -> torch.optim.Optimizer:
    """Return torch's AdamW, fused where torch has that."""
    groups = make_groups(model, config)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=_can_fuse(model))


def make_lion(model: Trunk, config: OptimConfig) -> torch.optim.Optimizer:
    """Return Lion, by the same groups and rules of width as AdamW: its steps are as large in every entry."""
    return Lion(make_groups(model, config), lr=config.lr, betas=config.betas)


def make_muon(
    model: Trunk,
    config: OptimConfig,
    scale: str = "match_rms_adamw",
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
    ns_eps: float = 1e-7,
    ns_dtype: str | None = None,
) -> torch.optim.Optimizer:
    """Return Muon for the matrices of attention, FFN and experts, with AdamW for all else.

    Args:
        model: whose parameters it steps.
        config: optim.betas and optim.eps are AdamW's.
        scale: of Muon's updates: match_rms_adamw, for which AdamW's rate and decay serve, or original.
        momentum, nesterov, ns_steps, ns_coefficients, ns_eps, ns_dtype: as Muon has them.
    """
    field = "optim.optimizer_options"
    chosen = lookup(f"{field}.scale", scale, SCALES)
    require(0 <= momentum < 1, f"{field}.momentum", momentum, "a number in [0, 1)")
    require(1 <= ns_steps <= 100, f"{field}.ns_steps", ns_steps, "an integer from 1 to 100")
    require(0 < ns_eps < math.inf, f"{field}.ns_eps", ns_eps, "a number > 0")
    three = len(ns_coefficients) == 3 and all(accepts(float, c) and math.isfinite(c) for c in ns_coefficients)
    require(three, f"{field}.ns_coefficients", ns_coefficients, "three numbers")
    if ns_dtype is not None and ns_dtype not in NS_DTYPES:
        raise ConfigError(f"{field}.ns_dtype", ns_dtype, suggest(ns_dtype, [*NS_DTYPES, "null"]))
    scaling = width_scaling(model.config, config)

    def extra(matrix: Matrix) -> tuple[float, Group]:
        if matrix.role in NOT_ORTHOGONALIZED:
            return scaling.lr_factor(matrix), {}
        factor = chosen(matrix.fan_out, matrix.fan_in)
        return width_factor(scaling, matrix, chosen), {"matrix_rows": num_rows(matrix), "update_factor": factor}

    iteration = (ns_steps, (*map(float, ns_coefficients),), ns_eps, ns_dtype)
    groups = make_groups(model, config, extra)
    of_adamw = (config.betas, config.eps)
    return Muon(groups, config.lr, *of_adamw, momentum, nesterov, *iteration, fused=_can_fuse(model))  # type: ignore[arg-type]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": make_adamw,
    "muon": make_muon,
    "lion": make_lion,
}
"""By name; each takes the model, an OptimConfig, and as options what is in its signature beside these."""


def make_optimizer(model: Trunk, config: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer of `optim.optimizer`.

    Raises:
        ConfigError: there is no such optimizer, or it does not take its options or our groups.
    """
    with as_config_errors("optim"):
        make = find("optimizer", config.optimizer, OPTIMIZERS)
    if config.optimizer in OPTIMIZERS:
        check_arguments("optim.optimizer_options", make, config.optimizer_options, "model", "config")
        optimizer = make(model, config, **config.optimizer_options)
    else:
        optimizer = _make_own(make, model, config)
    unscale_before_clipping(optimizer)
    return optimizer


def _make_own(make: Callable[..., Any], model: Trunk, config: OptimConfig) -> torch.optim.Optimizer:
    name, options = config.optimizer, config.optimizer_options
    try:
        parameters = dict(inspect.signature(make).parameters)
    except ValueError:  # of some that are written in C
        parameters = {}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    valid = "a class that takes parameters and lr, as torch's optimizers do"
    require(bool(parameters) and (takes_any or "lr" in parameters), "optim.optimizer", name, valid)
    check_arguments("optim.optimizer_options", make, options, next(iter(parameters)), "lr", "weight_decay")
    groups = make_groups(model, config)
    decays = any(group["weight_decay"] > 0 for group in groups)
    valid = f"0 with optim.optimizer={name}, which takes no weight_decay"
    require(takes_any or "weight_decay" in parameters or not decays, "optim.weight_decay", config.weight_decay, valid)
    try:
        optimizer = make(groups, lr=config.lr, **options)
    except UserError:
        raise
    except Exception as error:  # it is not ours, and may fail in any way
        valid = f"a class that takes our groups and optim.optimizer_options ({type(error).__name__}: {one_line(error)})"
        raise ConfigError("optim.optimizer", name, valid) from error
    valid = f"a class of torch.optim.Optimizer's kind, not one that makes a {type(optimizer).__name__}"
    require(isinstance(optimizer, torch.optim.Optimizer), "optim.optimizer", name, valid)
    return optimizer


def _can_fuse(model: Trunk) -> bool:
    return all(parameter.device.type in ("cpu", "cuda") for parameter in model.parameters())


def state_sizes(model: Trunk, config: OptimConfig) -> dict[Tensor, int]:
    """Return how many numbers the optimizer keeps of each parameter once it has stepped, counts of steps aside.

    Args:
        model: without weights, on the meta device, where a step costs nothing.
        config: names the optimizer.

    Raises:
        ConfigError: it cannot be made, or cannot step where there are no weights.
    """
    return {
        parameter: sum(kept.numel() for name, kept in state.items() if isinstance(kept, Tensor) and name != "step")
        for parameter, state in _stepped(model, config).state.items()
    }


def check_kept(model: Trunk, config: OptimConfig) -> None:
    """Refuse an optimizer of the user's own whose checkpoints could not be read: they are read as plain data.

    Args:
        model: without weights, on the meta device. An optimizer that cannot step there is not looked at.
        config: names the optimizer.

    Raises:
        ConfigError: it keeps something that is neither a plain tensor nor a plain value.
    """
    if config.optimizer in OPTIMIZERS:
        return
    try:
        state = _stepped(model, config).state
    except ConfigError:
        return
    for kept in state.values():
        for value in _leaves(kept):
            valid = f"one that keeps plain tensors and numbers, as checkpoints hold, and no {type(value).__name__}"
            require(type(value) in PLAIN, "optim.optimizer", config.optimizer, valid)


def _leaves(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list | tuple):
        for value in node:
            yield from _leaves(value)
    else:
        yield node


def _stepped(model: Trunk, config: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer after a step on gradients that are nothing."""
    optimizer = make_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    try:
        optimizer.step()
    except Exception as error:  # one of the user's own
        valid = f"one whose step can be taken without weights ({type(error).__name__}: {one_line(error)})"
        raise ConfigError("optim.optimizer", config.optimizer, valid) from error
    finally:
        for parameter in model.parameters():
            parameter.grad = None
    return optimizer
