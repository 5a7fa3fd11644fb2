"""Optimizer steps as against batches: under accumulation several batches make one step."""

import lightning as L


def completes_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether the batch is the last of its optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def is_logged(trainer: L.Trainer, step: int) -> bool:
    """Whether the loggers write the optimizer step of this number, counted from 1."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and step % every == 0
