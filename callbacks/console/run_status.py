"""Keeps what a run is doing in its folder, for whoever looks there: `python -m tools.runs`."""

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from core.cli import RunDiverged
from core.early_end import how_it_ended
from core.run_control import TrainingInterrupted
from core.status import DIVERGED, FAILED, FILE, RUNNING, STOPPED, TIMED_OUT, read
from core.steps import completes_step


class RunStatus(L.Callback):
    """Keeps RUN/status.json.

    | key | |
    |---|---|
    | status | running, done, stopped (by a signal or a callback), timed_out (its own time, or SIGUSR1), diverged, |
    | | failed |
    | step, max_steps | optimizer steps; null where a run of one's own Trainer is so many epochs long |
    | train_loss, val_loss | the last ones known; null where there is none that is finite |
    | reason | who has ended it early and why, or what is wrong with its end, in a line; null otherwise |

    `running` without the lock on the folder (core/run_lock.py) is a run that was killed: the system gives that back
    however a process dies. Comes behind whatever else writes at the end: `done` is the last word.

    Args:
        run_dir: the run's folder.
        every_seconds: at least that long between two updates.
    """

    def __init__(self, run_dir: str, every_seconds: float = 5.0) -> None:
        self.run_dir, self.every_seconds = Path(run_dir), every_seconds
        self._losses: dict[str, float | None] = {"train_loss": None, "val_loss": None}
        self._written = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not self._writes(trainer):
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        before = read(self.run_dir)
        self._losses = {name: before.get(name) for name in self._losses}
        self._write(trainer, RUNNING)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, RUNNING)  # a resumed run knows its step only now

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = time.monotonic() - self._written >= self.every_seconds
        if due and self._writes(trainer) and completes_step(trainer, batch_idx):
            self._note_losses(trainer)
            self._write(trainer, RUNNING)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._note_losses(trainer)
        self._write(trainer, RUNNING)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._note_losses(trainer)
        self._write(trainer, *how_it_ended(trainer))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        # With the losses noted before: Lightning may reduce a metric when it is asked for, and here one process asks.
        if isinstance(exception, TrainingInterrupted) and exception.signum == signal.SIGUSR1:
            status = TIMED_OUT  # what a scheduler sends before the time is up
        elif isinstance(exception, TrainingInterrupted | KeyboardInterrupt | SIGTERMException):
            status = STOPPED
        else:
            status = DIVERGED if isinstance(exception, RunDiverged) else FAILED
        lines = str(exception).strip().splitlines()
        self._write(trainer, status, lines[0] if lines else type(exception).__name__)

    def _writes(self, trainer: L.Trainer) -> bool:
        """Return whether this process writes, and the run is one that trains: a validation by itself is none."""
        return trainer.is_global_zero and trainer.state.fn == "fit"

    def _note_losses(self, trainer: L.Trainer) -> None:
        for name in self._losses:
            metric = trainer.callback_metrics.get(name.replace("_", "/"))
            if metric is not None:
                self._losses[name] = float(metric) if math.isfinite(metric) else None

    def _write(self, trainer: L.Trainer, status: str, reason: str | None = None) -> None:
        if not self._writes(trainer):
            return
        step = {"step": trainer.global_step, "max_steps": trainer.max_steps if trainer.max_steps >= 0 else None}
        new = self.run_dir / f"{FILE}.new"
        new.write_text(json.dumps({"status": status, **step, **self._losses, "reason": reason}, indent=2) + "\n")
        os.replace(new, self.run_dir / FILE)  # whoever reads meanwhile sees the old one or the new one
        self._written = time.monotonic()
