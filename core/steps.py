"""Optimizer steps as against batches: under accumulation several batches make one step."""

import math
from typing import Any

import lightning as L

from core.errors import require
from core.limits import require_at_most

MAX_STEPS, MAX_BATCHES = 10**9, 2**20  # of a run, and of one step


def completes_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether the batch is the last of its optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def begin_step(trainer: L.Trainer) -> None:
    """Let a resumed run begin with a whole optimizer step, before its first batch.

    Lightning counts on from the batches of the checkpoint. Where that was saved amid a step, or by a run that made its
    steps of another number of batches, the first step would be made of too few, and data that go by steps would be off.
    """
    if not trainer.fit_loop.restarting:
        return
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    shift = trainer.global_step * trainer.accumulate_grad_batches - progress.total.processed
    for counts in (progress.total, progress.current):
        for name in ("ready", "started", "processed", "completed"):
            setattr(counts, name, getattr(counts, name) + shift)


def is_logged(trainer: L.Trainer, step: int) -> bool:
    """Whether metrics of the optimizer step of this number, counted from 1, are wanted: by the loggers or, of the last
    one, by the summary."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return step == trainer.max_steps or (every > 0 and step % every == 0)


def check_length(trainer: L.Trainer) -> None:
    """Refuse a Trainer that would never end, or never step.

    Raises:
        ConfigError: the run's length is not given in steps, or a step in batches.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    valid = "an integer >= 1: the token stream has no end, a run is so many optimizer steps long"
    require(trainer.max_steps >= 1, "trainer.max_steps", trainer.max_steps, valid)
    require(trainer.max_epochs == -1, "trainer.max_epochs", trainer.max_epochs, "-1; give trainer.max_steps instead")
    batches = trainer.accumulate_grad_batches
    require(batches >= 1, "trainer.accumulate_grad_batches", batches, "an integer >= 1")
    require_at_most(MAX_STEPS, "trainer.max_steps", trainer.max_steps)
    require_at_most(MAX_BATCHES, "trainer.accumulate_grad_batches", batches)
    every = trainer.val_check_interval
    valid = f"an integer, a multiple of trainer.accumulate_grad_batches={batches}: a step is validated and saved whole"
    whole = isinstance(every, int) and every >= 1 and every % batches == 0
    require(whole, "trainer.val_check_interval", every, valid)
    clip = trainer.gradient_clip_val
    require(clip is None or 0 <= clip < math.inf, "trainer.gradient_clip_val", clip, "a number >= 0, or null")
    logged: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    require(logged >= 0, "trainer.log_every_n_steps", logged, "an integer >= 0; 0: never")
    limit: float = trainer.limit_train_batches
    require(limit == 1.0, "trainer.limit_train_batches", limit, "1.0; give trainer.max_steps instead")
