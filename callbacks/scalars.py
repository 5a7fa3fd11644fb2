"""Writes many scalars at once: what a monitor has to say about each block."""

from collections.abc import Iterable, Mapping

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary

MAX_BLOCKS = 16
"""At most so many blocks are written, or TensorBoard's page and the step's time would be deep models' curves."""


def write_scalars(trainer: L.Trainer, values: Mapping[str, float], step: int) -> None:
    """Write scalars to every logger, and let other callbacks see them in `trainer.callback_metrics`.

    TensorBoard takes them as one event: 4 us a scalar, where `add_scalar` and `log` take over 100. All processes call
    it: each sees the values of the first one, so that an EarlyStopping or a ModelCheckpoint decides alike everywhere.

    Args:
        step: the optimizer step that the values are of, counted from 1; it is written as Lightning counts, from 0.
    """
    if trainer.world_size > 1:
        values = trainer.strategy.broadcast(dict(values))
    if not values:
        return
    metrics = torch.tensor(list(values.values()), dtype=torch.float64).unbind()
    trainer.callback_metrics.update(zip(values, metrics, strict=True))
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
            logger.experiment.file_writer.add_summary(Summary(value=scalars), step - 1)
        else:
            logger.log_metrics(dict(values), step - 1)


def written_blocks(numbers: Iterable[int]) -> set[int]:
    """Return at most MAX_BLOCKS of them, evenly spaced, the first and the last among them."""
    ordered = sorted(set(numbers))
    if len(ordered) <= MAX_BLOCKS:
        return set(ordered)
    return {ordered[round(i * (len(ordered) - 1) / (MAX_BLOCKS - 1))] for i in range(MAX_BLOCKS)}
