"""last.ckpt: every n steps, at the end, and when somebody asks the process to stop."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from core.checkpoint import keep, remove
from core.errors import require
from core.interruption import TrainingInterrupted
from core.signals import STOPPING
from core.steps import at_the_end, completes_step
from core.together import failing_together


class LastCheckpoint(Checkpoint):
    """Keeps last.ckpt, which a run can always be resumed from, and previous.ckpt, the one before it.

    A step is saved when its metrics are with the loggers and its validation is done, right before the next one: where
    the process is killed, the log is never behind the checkpoint.

    On SIGINT (Ctrl-C), SIGTERM, or SIGUSR1 (SLURM's before the time is up) the step in progress is finished, with its
    validation where one is due, and saved before the process leaves, so that nothing is lost and the resumed curve is
    the uninterrupted one. A second Ctrl-C leaves at once; the other signals may come several times, and one after
    another: torchrun and SLURM each send theirs to all processes.

    Args:
        dirpath: where last.ckpt is written.
        every_n_train_steps: optimizer steps between two saves.

    Attributes:
        beside: called in every process before each save, with a folder for what belongs to the checkpoint but goes
            into none; it stays as long as the checkpoint does, see `folder_beside`.
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
        self._steps: list[int] = []  # of previous.ckpt and last.ckpt, as far as this run goes on from them
        self._due = self._follows_last = False
        self._received = self._leaving = 0  # signal numbers; 0: none
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.path = trainer.strategy.broadcast(self.path)  # ranks started at different seconds name different folders

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Here and not in setup, because Lightning installs its own handlers in between.
        try:
            self._handlers = {number: signal.signal(number, self._request) for number in STOPPING}
        except ValueError:  # not in the main thread (a notebook's executor, a test): Lightning's handling stays
            self._handlers = {}

        resumed = Path(trainer.ckpt_path).absolute() if trainer.ckpt_path else None
        here = resumed in (self.path.absolute(), self._previous.absolute())
        self._steps = [trainer.global_step] if here else []
        self._follows_last = resumed == self.path.absolute()
        # The batch before which it was saved had not begun; validations are counted by those that are ready.
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        batches.ready = min(batches.ready, batches.started)

    @property
    def _previous(self) -> Path:
        return self.path.with_name("previous.ckpt")

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self._received and signum == signal.SIGINT:
            signal.signal(signum, signal.default_int_handler)
            signal.raise_signal(signum)
        self._received = self._received or signum

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not at the end of the batch before: its metrics were not with the loggers yet.
        if self._due:
            self._due = False
            self._save(trainer)
        if self._leaving:
            self._finish_saving(trainer)  # by all: who leaves while another one is at it has that one killed
            raise TrainingInterrupted(self._leaving, trainer.global_step)
        # The step that loggers write. Lightning restores it one too small or too large where the checkpoint was saved
        # around a validation, and the curve of a resumed run would be shifted.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not completes_step(trainer, batch_idx):
            return
        if at_the_end(trainer):
            trainer.should_stop = True  # makes Lightning validate after the last step, wherever the interval falls
            return
        self._leaving = self._agreed_signal(trainer)
        self._due = bool(self._leaving) or trainer.global_step % self.every_n_train_steps == 0

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if at_the_end(trainer) and not trainer.sanity_checking:
            self._save(trainer)  # before anything at the end of training can fail

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Without a validation at the end. Not later: in their on_train_end, callbacks may put other weights in the
        # place of the trained ones, as WeightAveraging does.
        ends = trainer.should_stop or at_the_end(trainer) or trainer.current_epoch + 1 == trainer.max_epochs
        if ends and trainer.global_step not in self._steps:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_handlers()
        if trainer.global_step not in self._steps:
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
        with failing_together():
            for logger in trainer.loggers:
                logger.save()
            for save in self.beside:
                save(folder_beside(self.path, trainer.global_step))
        self._finish_saving(trainer)
        with failing_together():
            if trainer.is_global_zero and self._follows_last:
                keep(self.path, self._previous)
        trainer.save_checkpoint(self.path)
        with failing_together():
            if trainer.is_global_zero and not self._steps:
                remove(self._previous)  # of another course that this run has left
        self._steps, self._follows_last = [*self._steps[-1:], trainer.global_step], True
        self._forget(trainer)

    def _finish_saving(self, trainer: L.Trainer) -> None:
        """Of the last checkpoint, which may go on beside the training."""
        getattr(trainer.strategy, "finish_saving", bool)()

    def _forget(self, trainer: L.Trainer) -> None:
        """Remove what belonged to checkpoints that are gone."""
        if trainer.local_rank == 0:
            for folder in self.path.parent.glob("step_*/"):
                if folder not in [folder_beside(self.path, step) for step in self._steps]:
                    shutil.rmtree(folder, ignore_errors=True)

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def folder_beside(checkpoint: Path, step: int) -> Path:
    """Where the files lie that belong to the checkpoint of a step."""
    return checkpoint.parent / f"step_{step}"
