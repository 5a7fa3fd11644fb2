"""What one process of several does: `+callbacks.fault._target_=...`."""

import os
import signal
from typing import Any

import lightning as L
import torch


class SignalLast(L.Callback):
    """The last process gets a signal amid a step, counted from 1."""

    def __init__(self, signum: int, step: int) -> None:
        self.signum, self.step = signum, step

    def on_before_zero_grad(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step - 1 and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), self.signum)


class KillLast(SignalLast):
    """It is gone without a word."""

    def __init__(self, step: int) -> None:
        super().__init__(signal.SIGKILL, step)


class OwnNumbers(L.Callback):
    """Each process of a new run has other random numbers than the rest."""

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 0:
            torch.manual_seed(trainer.global_rank)
