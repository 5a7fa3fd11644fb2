"""Tells which data a step sees, as global sample numbers: with the seed they name the tokens (datamodules/order.py)."""

from typing import Any

import lightning as L


def samples_of_step(trainer: L.Trainer) -> list[int] | None:
    """Return [first, last] of the step in progress, over all processes; None where the data does not count them."""
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    if not hasattr(datamodule, "stream_identity"):
        return None
    first: int = datamodule.state_dict()["samples"]
    return [first, first + datamodule.batch_size * trainer.accumulate_grad_batches - 1]
