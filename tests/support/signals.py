"""A callback that sends its own process a signal."""

import signal
from typing import Any

import lightning as L


class SendSignal(L.Callback):
    """This process gets a signal amid the second batch of a step."""

    def __init__(self, signum: int, step: int) -> None:
        self.signum, self.step = signum, step

    def on_before_zero_grad(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step - 1:
            signal.raise_signal(self.signum)
