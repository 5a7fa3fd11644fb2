"""Optimizer steps as against batches: under accumulation several batches make one step."""

import math
from collections.abc import Iterable

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from core import compat
from core.errors import require
from core.limits import require_at_most

MAX_STEPS, MAX_BATCHES = 10**9, 2**20  # of a run, and of one step


def completes_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Return whether a batch is the last of its optimizer step: Lightning also steps on an epoch's last batch."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or bool(trainer.is_last_batch)


def num_steps(trainer: L.Trainer) -> float:
    """Return how many optimizer steps the Trainer will do, however its length is given; math.inf: nothing says it.

    Call it from `configure_optimizers` on: the length may follow from the training data, which Lightning then loads.
    """
    end = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    if trainer.max_epochs in (None, -1):  # None: given by steps, or not given; Lightning fills it in when it fits
        return end
    if getattr(getattr(trainer, "datamodule", None), "endless", False):
        # Its data are not loaded for this: those of a resumed run must not be before their position is known.
        limit = trainer.limit_train_batches
        batches: float = limit if isinstance(limit, int) else math.inf
    else:
        _ = trainer.estimated_stepping_batches  # loads the data, but takes all steps to be of the first one's size
        batches = trainer.num_training_batches
    sizes = [_batches_per_step(trainer, epoch) for epoch in range(max(trainer.max_epochs or 0, 1))]
    return min(end, sum(math.ceil(batches / size) for size in sizes) if math.isfinite(batches) else math.inf)


def num_batches(trainer: L.Trainer, steps: int) -> int:
    """Return how many batches of endless data the first optimizer steps of a run are made of.

    An epoch of `trainer.limit_train_batches` may end with a step of fewer batches, and a GradientAccumulationScheduler
    may make the steps of each epoch of another number.

    Args:
        trainer: of the run; how it accumulates is taken as having been so from the run's beginning.
        steps: that were done.
    """
    limit, batches = trainer.limit_train_batches, 0
    if not isinstance(limit, int) or limit < 1:  # a single epoch without an end
        return steps * _batches_per_step(trainer, 0)
    for epoch in range(_last_change(trainer)):
        size = _batches_per_step(trainer, epoch)
        if steps <= limit // size:
            return batches + steps * size
        steps, batches = max(steps - math.ceil(limit / size), 0), batches + limit
    size = _batches_per_step(trainer, _last_change(trainer))
    epochs, steps = divmod(steps, math.ceil(limit / size))
    return batches + epochs * limit + steps * size


def at_the_end(trainer: L.Trainer) -> bool:
    """Return whether the run has done the `max_steps` that it was to do; a run that is so many epochs long has none."""
    return 0 <= trainer.max_steps <= trainer.global_step


def begin_step(trainer: L.Trainer) -> None:
    """Let a resumed run begin with a whole optimizer step, before its first batch.

    Lightning counts on from the batches of the checkpoint. Where that was saved amid a step, or by a run that made its
    steps of another number of batches, the first step would be made of too few, and data that go by steps would be off.
    """
    batches, limit = _batches_per_step(trainer, trainer.current_epoch), trainer.limit_train_batches
    # Each epoch of a Trainer of one's own may end with a step of fewer batches.
    remainder = isinstance(limit, int) and limit % batches
    if compat.is_resuming(trainer) and not remainder:
        compat.set_processed_batches(trainer, trainer.global_step * batches)


def _batches_per_step(trainer: L.Trainer, epoch: int) -> int:
    """Return the batches of a step once the epoch begins, which is after the data were loaded."""
    for callback in _callbacks(trainer):
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def _last_change(trainer: L.Trainer) -> int:
    """Return the epoch from which on all steps are of the same number of batches."""
    schedulers = [c for c in _callbacks(trainer) if isinstance(c, GradientAccumulationScheduler)]
    return max((max(scheduler.scheduling) for scheduler in schedulers), default=0)


def _callbacks(trainer: L.Trainer) -> Iterable[L.Callback]:
    callbacks: Iterable[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def begin_epoch(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Call `on_train_epoch_start` where Lightning leaves it out: in a process that resumes a run amid an epoch.

    Callbacks set themselves up there: GradientAccumulationScheduler its number of batches, a progress bar its bar. To
    be called in the LightningModule's `on_train_start`, when those of all callbacks are done.
    """
    if compat.is_resuming_within_epoch(trainer):
        for callback in _callbacks(trainer):
            callback.on_train_epoch_start(trainer, pl_module)
        pl_module.on_train_epoch_start()


def is_logged(trainer: L.Trainer, step: int) -> bool:
    """Return whether an optimizer step's metrics are wanted: by the loggers or, of the last one, by the summary.

    Args:
        trainer: of the run.
        step: the step's number, counted from 1.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return step == trainer.max_steps or (every > 0 and step % every == 0)


def check_length(trainer: L.Trainer, val_check_interval: object = None) -> None:
    """Refuse a Trainer that would never end, or never step.

    Args:
        trainer: as train.py has built it.
        val_check_interval: as it was given to the Trainer.

    Raises:
        ConfigError: the run's length is not given in steps, or a step in batches.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    valid = "an integer >= 1: the token stream has no end, a run is so many optimizer steps long"
    require(trainer.max_steps >= 1, "trainer.max_steps", trainer.max_steps, valid)
    require(trainer.max_epochs == -1, "trainer.max_epochs", trainer.max_epochs, "-1; give trainer.max_steps instead")
    require(not trainer.min_epochs, "trainer.min_epochs", trainer.min_epochs, "null; give trainer.min_steps instead")
    compat.ask_for_no_epoch(trainer)
    batches = trainer.accumulate_grad_batches
    require(batches >= 1, "trainer.accumulate_grad_batches", batches, "an integer >= 1")
    require_at_most(MAX_STEPS, "trainer.max_steps", trainer.max_steps)
    require_at_most(MAX_BATCHES, "trainer.accumulate_grad_batches", batches)
    every = getattr(trainer, "val_check_interval", val_check_interval)  # a time is kept elsewhere by Lightning
    valid = f"an integer, a multiple of trainer.accumulate_grad_batches={batches}: a step is validated and saved whole"
    whole = isinstance(every, int) and every >= 1 and every % batches == 0
    require(whole, "trainer.val_check_interval", every, valid)
    clip = trainer.gradient_clip_val
    require(clip is None or 0 <= clip < math.inf, "trainer.gradient_clip_val", clip, "a number >= 0, or null")
    logged: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    require(logged >= 0, "trainer.log_every_n_steps", logged, "an integer >= 0; 0: never")
    limit: float = trainer.limit_train_batches
    require(limit == 1.0, "trainer.limit_train_batches", limit, "1.0; give trainer.max_steps instead")
