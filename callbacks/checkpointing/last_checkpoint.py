"""last.ckpt: every n steps, at the end, and when somebody asks the process to stop."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from core.checkpoint import folder_beside, keep, remove
from core.errors import require
from core.rank_errors import failing_together
from core.run_control import take_control
from core.steps import at_the_end, completes_step


class LastCheckpoint(Checkpoint):
    """Keeps last.ckpt, which a run can always be resumed from, and previous.ckpt, the one before it.

    A step is saved when its metrics are with the loggers and its validation is done, right before the next one: where
    the process is killed, the log is never behind the checkpoint. A step at whose end the process is asked to stop is
    saved too, so that nothing is lost and the resumed curve is the uninterrupted one.

    Other callbacks may keep files beside the checkpoints: it is what callbacks.protocols.KeepsBeside describes.

    Args:
        dirpath: where last.ckpt is written.
        every_n_train_steps: optimizer steps between two saves.
    """

    def __init__(self, dirpath: str, every_n_train_steps: int) -> None:
        require(
            every_n_train_steps >= 1,
            "callbacks.last_checkpoint.every_n_train_steps",
            every_n_train_steps,
            "an integer >= 1",
        )
        self.path, self.every_n_train_steps = Path(dirpath) / "last.ckpt", every_n_train_steps
        self._beside: list[Callable[[Path], None]] = []
        self._steps: list[int] = []  # of previous.ckpt and last.ckpt, as far as this run goes on from them
        self._due = self._follows_last = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.path = trainer.strategy.broadcast(self.path)  # ranks started at different seconds name different folders
        if stage == "fit":
            take_control(trainer)  # in a Trainer of your own, whose module may not have asked for it

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        resumed = Path(trainer.ckpt_path).absolute() if trainer.ckpt_path else None
        here = resumed in (self.path.absolute(), self._previous.absolute())
        self._steps = [trainer.global_step] if here else []
        self._follows_last = resumed == self.path.absolute()

    @property
    def _previous(self) -> Path:
        return self.path.with_name("previous.ckpt")

    def keep_beside(self, save: Callable[[Path], None]) -> None:
        """Call `save` in every process before each checkpoint, with the folder that belongs to it (folder_beside)."""
        self._beside.append(save)

    def save_before_leaving(self, trainer: L.Trainer) -> None:
        """Save the step that has just been done, unless it is saved already."""
        if trainer.global_step not in self._steps:
            self._save(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not at the end of the batch before: its metrics were not with the loggers yet.
        if self._due:
            self._due = False
            self._save(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if completes_step(trainer, batch_idx) and not at_the_end(trainer):
            self._due = trainer.global_step % self.every_n_train_steps == 0

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
        if trainer.global_step not in self._steps:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        finish_saving = getattr(trainer.strategy, "finish_saving", bool)  # of a strategy that saves beside the training
        with failing_together():
            for logger in trainer.loggers:
                logger.save()
            for save in self._beside:
                save(folder_beside(self.path, trainer.global_step))
        finish_saving()
        with failing_together():
            if trainer.is_global_zero and self._follows_last:
                keep(self.path, self._previous)
        trainer.save_checkpoint(self.path)
        with failing_together():
            if trainer.is_global_zero and not self._steps:
                remove(self._previous)  # of another course that this run has left
        self._steps, self._follows_last = [*self._steps[-1:], trainer.global_step], True
        self._forget(trainer)

    def _forget(self, trainer: L.Trainer) -> None:
        """Remove what belonged to checkpoints that are gone."""
        if trainer.local_rank == 0:
            for folder in self.path.parent.glob("step_*/"):
                if folder not in [folder_beside(self.path, step) for step in self._steps]:
                    shutil.rmtree(folder, ignore_errors=True)
