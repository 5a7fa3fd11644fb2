"""Statistics of gradients and parameters for all monitors: computed once a step, by whoever asks first."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from core.compat import foreach_differences, foreach_norms, total_batch
from core.steps import is_logged


class Group(NamedTuple):
    """Names what is summed up into one figure.

    Attributes:
        block: counted from 1; 0 outside of the blocks.
        kind: attn_in, attn_out, ffn_up, ffn_down, norm, residual, embedding, head, router or experts.
    """

    block: int
    kind: str


class GradientStatistics(NamedTuple):
    """Describes the gradients of one optimizer step: accumulated, over all processes, before clipping.

    Attributes:
        groups: which the lists below go by.
        norms: l2 norm of the gradient.
        nonfinite: share of the gradient's entries that are infinite or no number.
        total_norm: l2 norm over all groups.
        step: of the optimizer step, counted from 1.
        parameter_norms: l2 norm of the parameters; empty on steps that the loggers leave out.
        update_norms: l2 norm of what the optimizer step before this one changed; empty where nobody watched it.
        nonfinite_share: share of the entries of all gradients together.
        carried: what `add_to_transfer` was given.
    """

    groups: tuple[Group, ...]
    norms: list[float]
    nonfinite: list[float]
    total_norm: float
    step: int
    parameter_norms: list[float]
    update_norms: list[float]
    nonfinite_share: float = 0.0
    carried: Mapping[str, list[float]] = MappingProxyType({})


class _Cache:
    """Keeps, for one LightningModule, what lies between two questions.

    Attributes:
        batch: number of the step's last batch, and a gradient of that step: they tell whether `statistics` still hold.
        watched: the parameters as they were before step `watched_step`.
        restored: of a resumed run, the norms of that step's update, by parameter, which another process has measured.
        carried: what waits for the next transfer.
        trainer: for which `labelled` holds; the parameters of a run stay the same objects.
        labelled: every parameter, with its group.
    """

    def __init__(self) -> None:
        self.trainer: Callable[[], L.Trainer | None] = lambda: None
        self.labelled: list[tuple[Group, Any]] = []
        self.batch, self.gradient = -1, lambda: None
        self.statistics: GradientStatistics | None = None
        self.watched: dict[Tensor, Tensor] = {}
        self.restored: dict[Tensor, float] = {}
        self.watched_step = -1
        self.carried: dict[str, Tensor] = {}


_CACHES: WeakKeyDictionary[L.LightningModule, _Cache] = WeakKeyDictionary()


def gradient_statistics(trainer: L.Trainer, pl_module: L.LightningModule) -> GradientStatistics:
    """Return the step's statistics, with one transfer from the device, and a second where a gradient is not finite.

    To be called first in `on_before_optimizer_step`, by all processes alike; until the next step, every further call
    returns the same object. All processes get the same figures.

    Args:
        pl_module: its `model` has `parameter_groups()`, as Transformer does.
    """
    cache, batch = _CACHES.setdefault(pl_module, _Cache()), total_batch(trainer)
    labelled = [(group, p) for group, p in _labelled(trainer, pl_module) if p.grad is not None]
    gradient = labelled[0][1].grad
    # The number alone would do, were it not that a run may be taken back to an earlier step.
    if cache.statistics is None or cache.batch != batch or cache.gradient() is not gradient:
        cache.batch, cache.gradient = batch, ref(gradient)
        step = trainer.global_step + 1
        cache.statistics = _compute(labelled, cache, step, is_logged(trainer, step))
    return cache.statistics


def watch_update(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Keep the parameters, in `on_before_optimizer_step`, so that the next step's statistics know this step's update.

    Until then it takes as much memory as the parameters.
    """
    cache = _CACHES.setdefault(pl_module, _Cache())
    cache.watched = {parameter: _local(parameter.detach()).clone() for _, parameter in _labelled(trainer, pl_module)}
    cache.watched_step = trainer.global_step + 1


def forget_update(pl_module: L.LightningModule) -> None:
    """Forget the parameters of before: they were replaced since, and say nothing of the optimizer's update."""
    cache = _CACHES.setdefault(pl_module, _Cache())
    cache.watched, cache.restored = {}, {}


def update_to_save(trainer: L.Trainer, pl_module: L.LightningModule) -> list[float]:
    """Return the l2 norm of each parameter's last update, where the next step's statistics are to know it.

    They go into the checkpoint: a process that goes on from there does not have the weights of before. To be called by
    all processes together; empty where nobody has watched.
    """
    cache = _CACHES.setdefault(pl_module, _Cache())
    parameters = [parameter for _, parameter in _labelled(trainer, pl_module)]
    if cache.watched_step != trainer.global_step:
        return []
    if all(p in cache.watched for p in parameters):
        return _update_norms(cache, parameters).tolist()
    return [cache.restored[p] for p in parameters] if all(p in cache.restored for p in parameters) else []


def restore_update(trainer: L.Trainer, pl_module: L.LightningModule, norms: Sequence[float]) -> None:
    """Take up, in a run that has just been resumed, what `update_to_save` gave; of another model, it is left out."""
    cache = _CACHES.setdefault(pl_module, _Cache())
    parameters = [parameter for _, parameter in _labelled(trainer, pl_module)]
    if len(parameters) == len(norms):
        cache.restored = dict(zip(parameters, norms, strict=True))
        cache.watched_step = trainer.global_step


def add_to_transfer(pl_module: L.LightningModule, name: str, values: Tensor) -> None:
    """Send a monitor's own figures along with the step's transfer; to be called before `on_before_optimizer_step`.

    Args:
        name: of the entry in `GradientStatistics.carried`.
        values: [n], on the device; every process gets back its own.
    """
    _CACHES.setdefault(pl_module, _Cache()).carried[name] = values


def _labelled(trainer: L.Trainer, pl_module: L.LightningModule) -> list[tuple[Group, Any]]:
    cache = _CACHES.setdefault(pl_module, _Cache())
    if cache.trainer() is not trainer:  # to go through all modules costs more than the norms of a small model
        model: Any = pl_module.model
        cache.labelled = [(Group(block, kind), parameter) for block, kind, parameter in model.parameter_groups()]
        cache.trainer = ref(trainer)
    return cache.labelled


def _compute(labelled: list[tuple[Group, Any]], cache: _Cache, step: int, logged: bool) -> GradientStatistics:
    parameters = [p for _, p in labelled]
    measured = [norms([p.grad for p in parameters], parameters)]
    if logged:
        measured.append(norms(parameters, parameters))
    before = logged and cache.watched_step == step - 1
    if before and all(p in cache.watched for p in parameters):
        measured.append(_update_norms(cache, parameters))
    elif before and all(p in cache.restored for p in parameters):
        measured.append(torch.tensor([cache.restored[p] for p in parameters], device=measured[0].device))
    if cache.watched_step < step:
        cache.watched, cache.restored = {}, {}
    carried, cache.carried = cache.carried, {}
    sizes = [len(parameters)] * len(measured) + [len(values) for values in carried.values()]
    flat = iter(
        torch.cat([*measured, *(values.to(measured[0].dtype) for values in carried.values())]).tolist()
    )  # the one transfer
    rows = [list(islice(flat, size)) for size in sizes]

    groups = tuple(dict.fromkeys(group for group, _ in labelled))
    labels = [group for group, _ in labelled]
    by_group = [_root_sum_squares(row, labels, groups) for row in rows[: len(measured)]]
    nonfinite, share = _nonfinite(labelled, rows[0], groups)
    return GradientStatistics(
        groups=groups,
        norms=by_group[0],
        nonfinite=nonfinite,
        nonfinite_share=share,
        total_norm=math.hypot(*by_group[0]),
        step=step,
        parameter_norms=by_group[1] if len(by_group) > 1 else [],
        update_norms=by_group[2] if len(by_group) > 2 else [],
        carried=dict(zip(carried, rows[len(measured) :], strict=True)),
    )


@torch.no_grad()
def _update_norms(cache: _Cache, parameters: Sequence[Tensor]) -> Tensor:
    before = [cache.watched[p] for p in parameters]
    return norms(foreach_differences([_local(p.detach()) for p in parameters], before), parameters)


@torch.no_grad()
def norms(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
    """Return each l2 norm, [tensors], on their device; of the whole tensor where processes hold a part each. Summed in
    fp32, or in fp64 where there are tensors in fp64.

    Args:
        tensors: or the local parts of distributed ones.
        like: the parameters, whose distribution counts.
    """
    parts = [_local(t) for t in tensors]
    dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    local = foreach_norms(parts, dtype)
    return _over_processes(local.square(), like).sqrt() if any(isinstance(p, DTensor) for p in like) else local


def _over_processes(values: Tensor, like: Sequence[Tensor]) -> Tensor:
    """Return the values, [parameters], summed over the processes that hold different parts of the parameter."""
    layouts = [(p.device_mesh, p.placements) if isinstance(p, DTensor) else None for p in like]
    total = values.clone()
    for layout in dict.fromkeys(layout for layout in layouts if layout is not None):
        mesh, placements = layout
        index = torch.tensor([i for i, other in enumerate(layouts) if other == layout], device=values.device)
        summed = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
        total[index] = DTensor.from_local(values[index], mesh, summed, run_check=False).full_tensor()
    return total


@torch.no_grad()
def _nonfinite(
    labelled: list[tuple[Group, Any]], found: list[float], groups: Sequence[Group]
) -> tuple[list[float], float]:
    """Return the share by group, and of all. A finite norm has finite entries: only other gradients are looked at."""
    suspects = [pair for pair, norm in zip(labelled, found, strict=True) if not math.isfinite(norm)]
    if not suspects:
        return [0.0] * len(groups), 0.0
    counts = torch.stack([(~_local(p.grad).isfinite()).sum().float() for _, p in suspects])
    bad, size = dict.fromkeys(groups, 0.0), dict.fromkeys(groups, 0)
    for (group, _), count in zip(suspects, _over_processes(counts, [p for _, p in suspects]).tolist(), strict=True):
        bad[group] += count
    for group, parameter in labelled:
        size[group] += parameter.numel()
    return [bad[group] / size[group] for group in groups], sum(bad.values()) / sum(size.values())


def _root_sum_squares(values: Sequence[float], labels: Sequence[Group], groups: Sequence[Group]) -> list[float]:
    """Return the l2 norm over the tensors of each group."""
    parts: dict[Group, list[float]] = {group: [] for group in groups}
    for label, value in zip(labels, values, strict=True):
        parts[label].append(value)
    return [math.hypot(*parts[group]) for group in groups]


def _local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
