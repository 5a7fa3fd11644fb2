"""last.ckpt: every n steps, at the end, and when somebody asks the process to stop."""

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from core.errors import require
from core.interruption import TrainingInterrupted
from core.steps import completes_step


class LastCheckpoint(Checkpoint):
    """Keeps one checkpoint that a run can always be resumed from.

    On SIGINT (Ctrl-C), SIGTERM, or SIGUSR1 (SLURM's before the time is up) the step in progress is finished, with its
    validation where one is due, and saved before the process leaves, so that nothing is lost and the resumed curve is
    the uninterrupted one. A second signal leaves at once.

    Args:
        dirpath: where last.ckpt is written.
        every_n_train_steps: optimizer steps between two saves.

    Attributes:
        beside: called in every process after each save, with last.ckpt's folder; for what goes into no checkpoint.
    """

    def __init__(self, dirpath: str, every_n_train_steps: int) -> None:
        require(
            every_n_train_steps >= 1,
            "callbacks.last_checkpoint.every_n_train_steps",
            every_n_train_steps,
            "an integer >= 1",
        )
        self.path, self.every_n_train_steps = Path(dirpath) / "last.ckpt", every_n_train_steps
        self.beside: list[Callable[[Path], None]] = []
        self._saved_step = -1
        self._received = self._leaving = 0  # signal numbers; 0: none
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.path = trainer.strategy.broadcast(self.path)  # ranks started at different seconds name different folders

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Here and not in setup, because Lightning installs its own handlers in between.
        try:
            self._handlers = {
                number: signal.signal(number, self._request)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
            }
        except ValueError:  # not in the main thread (a notebook's executor, a test): Lightning's handling stays
            self._handlers = {}

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self._received:
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(signum)
        self._received = signum

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not at the end of the batch before: its metrics were not with the loggers yet.
        if self._leaving:
            raise TrainingInterrupted(self._leaving, trainer.global_step)
        # The step that loggers write. Lightning restores it one too small or too large where the checkpoint was saved
        # around a validation, and the curve of a resumed run would be shifted.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not completes_step(trainer, batch_idx):
            return
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True  # makes Lightning validate after the last step, wherever the interval falls
            return
        self._leaving = self._agreed_signal(trainer)
        if self._leaving or trainer.global_step % self.every_n_train_steps == 0:
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        finished = trainer.global_step >= trainer.max_steps
        if (finished or self._saved_step == trainer.global_step) and not trainer.sanity_checking:
            self._save(trainer)  # anew, or a resumed run would not know of this validation

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_handlers()
        if self._saved_step != trainer.global_step:
            self._save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _agreed_signal(self, trainer: L.Trainer) -> int:
        """The signal that any rank received, or 0: all must leave after the same step."""
        if trainer.world_size == 1:
            return self._received
        received = torch.tensor(self._received, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        for save in self.beside:
            save(self.path.parent)
        self._saved_step = trainer.global_step

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
