"""The one number that a sweeper is told of a run."""

import math
from pathlib import Path

import lightning as L

from core import status
from core.sweep import WORST_LOSS


def final_loss(trainer: L.Trainer, run_dir: Path) -> float:
    """Return the last validation loss: finite, and at most WORST_LOSS, which also stands for none.

    Args:
        trainer: of the run, which has ended.
        run_dir: its folder, which knows the loss where the run had been trained to its end before.
    """
    loss = trainer.callback_metrics.get("val/loss", status.read(run_dir).get("val_loss"))
    value = WORST_LOSS if loss is None else float(loss)
    return min(value, WORST_LOSS) if math.isfinite(value) else WORST_LOSS
