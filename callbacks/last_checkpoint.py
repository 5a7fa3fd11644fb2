"""last.ckpt: every n steps, at the end, and when somebody asks the process to stop."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from core.steps import completes_step


class TrainingInterrupted(Exception):
    """A signal ended the run early; everything is saved.

    Attributes:
        signum: the signal.
        step: optimizer steps done.
    """

    def __init__(self, signum: int, step: int) -> None:
        self.signum, self.step = signum, step
        super().__init__(f"{signal.Signals(signum).name} after step {step}")


class LastCheckpoint(ModelCheckpoint):
    """Keeps one checkpoint that a run can always be resumed from.

    On SIGINT (Ctrl-C) or SIGTERM the step in progress is finished and saved before the process leaves, so that nothing
    is lost and the resumed curve is the uninterrupted one. A second signal leaves at once.

    Args:
        dirpath: where last.ckpt is written.
        every_n_train_steps: optimizer steps between two saves.
    """

    def __init__(self, dirpath: str, every_n_train_steps: int) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="last",
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )
        self._signum: int | None = None
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # Here and not in setup, because Lightning installs its own handlers in between.
        try:
            self._handlers = {
                number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)
            }
        except ValueError:  # not in the main thread (a notebook's executor, a test): Lightning's handling stays
            self._handlers = {}

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None:
            self._restore_handlers()
            signal.raise_signal(signum)
        self._signum = signum

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not completes_step(trainer, batch_idx):
            return
        if signum := self._agreed_signal(trainer):
            self._save_now(trainer)
            raise TrainingInterrupted(signum, trainer.global_step)
        if trainer.global_step >= trainer.max_steps > 0:
            trainer.should_stop = True  # makes Lightning validate after the last step, wherever the interval falls

    def _agreed_signal(self, trainer: L.Trainer) -> int:
        """The signal that any rank received: all must leave after the same step."""
        mine = self._signum or 0
        if trainer.world_size == 1:
            return mine
        seen = trainer.strategy.reduce(torch.tensor(mine, device=trainer.strategy.root_device), reduce_op="max")
        return int(seen)

    def _save_now(self, trainer: L.Trainer) -> None:
        assert self.dirpath is not None
        trainer.save_checkpoint(str(Path(self.dirpath) / "last.ckpt"))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_handlers()
        self._save_now(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
