"""A progress bar over optimizer steps; plain lines where the output is no terminal."""

import math
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from core.steps import completes_step, num_steps
from core.task import task_of


class StepProgress(ProgressBar):
    """Shows step, loss, tokens/s or images/s, and time left.

    Lightning's own bars count batches of an epoch; the stream of samples has no end, a run is so many steps long.

    Args:
        refresh_seconds: time between two updates of the bar.
        line_seconds: time between two lines where there is no terminal.
    """

    def __init__(self, refresh_seconds: float = 0.5, line_seconds: float = 15.0) -> None:
        super().__init__()
        self.console = Console()
        self.period = refresh_seconds if self.console.is_terminal else line_seconds
        self._bar: Progress | None = None
        self._enabled, self._num_steps = True, math.inf

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first_step, self._first_time, self._last_shown = trainer.global_step, time.monotonic(), 0.0
        self._num_steps = num_steps(trainer)
        if self._enabled and self.console.is_terminal:
            columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task(
                "starting",
                total=self._num_steps if math.isfinite(self._num_steps) else None,
                completed=trainer.global_step,
            )
            self._bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, finished = time.monotonic(), trainer.global_step >= self._num_steps
        due = finished or now - self._last_shown >= self.period
        if not (self._enabled and due and completes_step(trainer, batch_idx)):
            return
        self._last_shown = now
        # Lightning divides what training_step returns by the number of batches that make a step.
        loss = outputs["loss"].item() * trainer.accumulate_grad_batches
        of = f"/{self._num_steps}" if math.isfinite(self._num_steps) else ""
        text = f"step {trainer.global_step}{of}  loss {loss:.3f}"
        counted = task_of(pl_module).counted
        rate = trainer.callback_metrics.get(f"train/{counted}_per_second")
        if rate is not None:
            text += f"  {float(rate):,.0f} {counted}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, description=text)
        else:
            left = f"  {self._time_left(trainer, now)} left" if of else ""
            self.console.print(f"{text}{left}", highlight=False, markup=False)

    def _time_left(self, trainer: L.Trainer, now: float) -> str:
        done, left = trainer.global_step - self._first_step, self._num_steps - trainer.global_step
        seconds = (now - self._first_time) / max(done, 1) * left
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}"

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = trainer.callback_metrics.get("val/loss")
        if self._enabled and loss is not None and not trainer.sanity_checking:
            self.console.print(
                f"step {trainer.global_step}: validation loss {float(loss):.4f}", highlight=False, markup=False
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
