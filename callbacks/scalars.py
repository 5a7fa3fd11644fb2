"""Writes many scalars at once: what a monitor has to say about each block."""

import math
import re
import statistics
from collections.abc import Iterable, Mapping
from functools import lru_cache

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary

from core.chosen_scalars import choose_scalars
from core.tensorboard import with_overview

MAX_BLOCKS = 16
"""At most so many blocks are written, or TensorBoard's page and the step's time would be deep models' curves."""


@lru_cache(maxsize=1 << 14)  # the same names come at every logged step
def of_block(name: str) -> tuple[str, int, str] | None:
    """Return (prefix, number, figure) of a tag PREFIX_NUMBER/FIGURE; None: it is no figure of one block.

    The prefix ends in `/block`, or in `/layer` as routers' does: `signal/block_3/variance`, `moe/layer_3/entropy`.
    """
    parts = re.fullmatch(r"(.+/(?:block|layer))_(\d+)/(.+)", name)
    return (parts[1], int(parts[2]), parts[3]) if parts else None


def write_scalars(trainer: L.Trainer, values: Mapping[str, float], step: int) -> None:
    """Let other callbacks see scalars in `trainer.callback_metrics`, and write them to every logger.

    Of figures of one block (of_block) the loggers get what a callback chooses (callbacks.protocols.ChoosesScalars), of
    MAX_BLOCKS blocks at most. TensorBoard takes all as one event: 4 us a scalar, where `add_scalar` and `log` take over
    100. All processes call it: each sees the values of the first one, so that an EarlyStopping or a ModelCheckpoint
    decides alike everywhere.

    Args:
        step: the optimizer step that the values are of, counted from 1; it is written as Lightning counts, from 0.
    """
    if trainer.world_size > 1:
        values = trainer.strategy.broadcast(dict(values))
    if not values:
        return
    metrics = torch.tensor(list(values.values()), dtype=torch.float64).unbind()
    trainer.callback_metrics.update(zip(values, metrics, strict=True))
    values = choose_scalars(trainer, values, step)
    if not trainer.is_global_zero:
        return
    values = _of_few_blocks(values)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            scalars = [Summary.Value(tag=name, simple_value=value) for name, value in with_overview(values).items()]
            logger.experiment.file_writer.add_summary(Summary(value=scalars), step - 1)
        else:
            logger.log_metrics(dict(values), step - 1)


def written_blocks(numbers: Iterable[int]) -> set[int]:
    """Return at most MAX_BLOCKS of them, evenly spaced, the first and the last among them."""
    ordered = sorted(set(numbers))
    if len(ordered) <= MAX_BLOCKS:
        return set(ordered)
    return {ordered[round(i * (len(ordered) - 1) / (MAX_BLOCKS - 1))] for i in range(MAX_BLOCKS)}


def ends_and_worst(values: Mapping[str, float]) -> dict[str, float]:
    """Return of each figure that more than three blocks have the first's, the last's and the worst one's; else all.

    The worst is called PREFIX_worst/FIGURE, as signal/block_worst/variance: one that is no finite number, or the
    largest of a maximum, or else the one farthest from the blocks' median, by ratio where all are positive. What a part
    of a block has by itself (attn/from_3) is not the same thing in each block, and has no worst.
    """
    kept, numbers = dict(values), _by_prefix(values)
    for (prefix, figure), by_block in _by_figure(values).items():
        of_part = "/" in figure
        ends = numbers[prefix] if of_part else by_block
        if len(ends) <= 3:
            continue
        for block in by_block.keys() - {min(ends), max(ends)}:
            del kept[f"{prefix}_{block}/{figure}"]
        if not of_part:
            kept[f"{prefix}_worst/{figure}"] = _worst(list(by_block.values()), figure)
    return kept


def _worst(values: list[float], figure: str) -> float:
    for value in values:
        if not math.isfinite(value):
            return value
    if figure == "max" or figure.endswith("_max"):
        return max(values)
    middle = statistics.median(values)
    if min(values) > 0:
        return max(values, key=lambda value: abs(math.log(value / middle)))
    return max(values, key=lambda value: abs(value - middle))


def _of_few_blocks(values: Mapping[str, float]) -> dict[str, float]:
    """Return of each figure that of MAX_BLOCKS blocks at most."""
    kept, numbers = dict(values), _by_prefix(values)
    for (prefix, figure), by_block in _by_figure(values).items():
        for block in by_block.keys() - written_blocks(numbers[prefix]):
            del kept[f"{prefix}_{block}/{figure}"]
    return kept


def _by_prefix(values: Mapping[str, float]) -> dict[str, set[int]]:
    """Return the numbers of the blocks that each prefix has figures of."""
    found: dict[str, set[int]] = {}
    for (prefix, _), by_block in _by_figure(values).items():
        found.setdefault(prefix, set()).update(by_block)
    return found


def _by_figure(values: Mapping[str, float]) -> dict[tuple[str, str], dict[int, float]]:
    found: dict[tuple[str, str], dict[int, float]] = {}
    for name, value in values.items():
        if (parts := of_block(name)) is not None:
            prefix, block, figure = parts
            found.setdefault((prefix, figure), {})[block] = value
    return found
