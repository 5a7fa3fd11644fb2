"""Tells how a run ended without an error: at its last step or early, and with losses that are numbers or not."""

import math
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple, Protocol, runtime_checkable

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, Timer
from omegaconf import DictConfig

from core.cli import RunDiverged
from core.errors import ConfigError, one_line
from core.lightning_callbacks import field_of
from core.status import DIVERGED, DONE, STOPPED, TIMED_OUT
from core.steps import at_the_end


@runtime_checkable
class SaysWhyItStopped(Protocol):
    """A callback that sets `trainer.should_stop`, and says why.

    Attributes:
        stopping_reason: in a line; None: it has not.
    """

    stopping_reason: str | None


class EarlyEnd(NamedTuple):
    """An end before the run's last step, without an error.

    Attributes:
        status: core.status.TIMED_OUT or STOPPED.
        reason: who has stopped it, and why, in one line.
    """

    status: str
    reason: str


def early_end(trainer: L.Trainer) -> EarlyEnd | None:
    """Return how training has stopped before the run's last step; None: it has not."""
    if at_the_end(trainer) or not trainer.should_stop:
        return None
    found = [(callback, reason) for callback in _callbacks(trainer) if (reason := _reason_of(callback))]
    timed_out = any(isinstance(callback, Timer) for callback, _ in found)
    reasons = "; ".join(reason for _, reason in found)
    return EarlyEnd(TIMED_OUT if timed_out else STOPPED, reasons or "a callback has set trainer.should_stop")


def how_it_ended(trainer: L.Trainer) -> tuple[str, str | None]:
    """Return the status of a run that has ended without an error, and in a line what there is to say of it."""
    losses = {name: trainer.callback_metrics.get(name) for name in ("train/loss", "val/loss")}
    bad = [name for name, loss in losses.items() if loss is not None and not math.isfinite(loss)]
    end = early_end(trainer)
    if bad:
        return DIVERGED, f"{f'{end.reason}; ' if end is not None else ''}not finite at its end: {', '.join(bad)}"
    return end if end is not None else (DONE, None)


def tell_end(trainer: L.Trainer) -> None:
    """Print that a run has ended early or has diverged, once for all processes.

    Raises:
        RunDiverged: a loss is no finite number at the end, though nobody gave the run up.
    """
    status, reason = how_it_ended(trainer)
    if status == DONE:
        return
    of = f" of {trainer.max_steps}" if trainer.max_steps >= 0 else ""
    line = f"{'Diverged' if status == DIVERGED else 'Ended early'}, after step {trainer.global_step}{of}: {reason}."
    if trainer.is_global_zero:
        print(line, flush=True)
    if status == DIVERGED:
        raise RunDiverged(trainer.global_step, line)


def check_time_left(trainer: L.Trainer, checkpoint: Mapping[str, Any], config: DictConfig | None = None) -> None:
    """Refuse to resume a run whose time is up: Lightning would train nothing, and say nothing.

    Args:
        trainer: not yet fitting; one with `max_time` has a Timer among its callbacks.
        checkpoint: what the one says of its run that this run is to go on from.
        config: the composed configuration, for the name of the field.

    Raises:
        ConfigError: the run has trained for as long as it may.
    """
    if checkpoint["global_step"] >= trainer.max_steps:  # nothing is trained in any case
        return
    for callback in _callbacks(trainer):
        state = checkpoint["callbacks"].get(callback.state_key)
        if not isinstance(callback, Timer) or state is None:
            continue
        callback.load_state_dict(state)  # as Lightning will once more
        left = callback.time_remaining()
        if left is not None and left <= 0:
            used = timedelta(seconds=int(callback.time_elapsed()))
            given = timedelta(seconds=int(callback.time_elapsed() + left))
            valid = f"more than {used}, which the run has trained already: the time counts from its first step"
            field = field_of(callback, config)
            raise ConfigError(f"{field}.duration" if field != "callbacks" else "trainer.max_time", str(given), valid)


def _reason_of(callback: Any) -> str | None:
    if isinstance(callback, Timer):
        left = callback.time_remaining()
        if left is not None and left <= 0:
            given = timedelta(seconds=round(callback.time_elapsed() + left))
            return f"the time of {given} (trainer.max_time or a Timer) is used up, and counts from the run's first step"
    if isinstance(callback, EarlyStopping) and callback.stopping_reason_message is not None:
        return f"EarlyStopping: {one_line(callback.stopping_reason_message).rstrip('.')}"
    if isinstance(callback, SaysWhyItStopped):
        return callback.stopping_reason and f"{type(callback).__name__}: {callback.stopping_reason}"
    return None


def _callbacks(trainer: L.Trainer) -> list[L.Callback]:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks
