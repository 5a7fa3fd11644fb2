"""Lets callbacks see and choose what is logged of each block, whoever measures it: a monitor or the LightningModule."""

from collections.abc import Mapping
from typing import Any

import lightning as L


def choose_scalars(trainer: L.Trainer, values: Mapping[str, float], step: int) -> Mapping[str, float]:
    """Return what the loggers get, as the callbacks choose in turn that do so: callbacks.protocols.ChoosesScalars.

    To be called in all processes together, with the same values.

    Args:
        values: by tag.
        step: the optimizer step that they are of, counted from 1.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if hasattr(callback, "choose_scalars"):  # isinstance of a protocol takes ten times as long
            values = callback.choose_scalars(values, step)
    return values
