"""Does for every run, whatever callbacks it has: stop when it is asked to, validate at its end, count its steps."""

import signal
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping

from core import compat
from core.signals import STOPPING
from core.steps import at_the_end, completes_step


class TrainingInterrupted(SystemExit):
    """A signal has ended the run early, behind a whole step.

    Where nobody catches it, as under a Trainer of your own, the process exits with 128 + the signal's number.

    Attributes:
        signum: the signal.
        step: optimizer steps done.
        saved: whether a callback has saved that step.
    """

    def __init__(self, signum: int, step: int, saved: bool = True) -> None:
        self.signum, self.step, self.saved = signum, step, saved
        super().__init__(128 + signum)

    def __str__(self) -> str:
        return f"{signal.Signals(self.signum).name} after step {self.step}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.signum, self.step, self.saved)


@runtime_checkable
class SavesBeforeLeaving(Protocol):
    """A callback that can save the run before its processes leave upon a signal; LastCheckpoint is one."""

    def save_before_leaving(self, trainer: L.Trainer) -> None:
        """Save the step that has just been done, unless that has happened already. All processes call it."""


class RunControl(L.Callback):
    """Belongs to the run, not to its configuration: `take_control` adds it to a Trainer that has none.

    - On SIGINT (Ctrl-C), SIGTERM, or SIGUSR1 (SLURM's before the time is up) the step in progress is finished, with its
      validation where one is due; callbacks that can save it do so; and then all processes leave together. A second
      Ctrl-C leaves at once; the other signals may come several times, and one after another: torchrun and SLURM each
      send theirs to all processes.
    - The last of `max_steps` steps is validated, wherever the validation interval falls.
    - A resumed run counts its steps and batches as the uninterrupted one does, and an EarlyStopping has the patience
      that it is given: Lightning would take the checkpoint's.

    It acts behind all other callbacks, so that what they do at the end of a step is done before the process leaves.

    Attributes:
        received: number of the signal that this process was sent first; 0: none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._leaving = 0  # number of the signal upon which all processes have agreed to leave; 0: none
        self._handlers: dict[int, Any] = {}  # that were there before
        self._patience: list[tuple[EarlyStopping, int]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Before Lightning hands out the checkpoint's states.
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._patience = [
            (callback, callback.patience) for callback in callbacks if isinstance(callback, EarlyStopping)
        ]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Here and not in setup, because Lightning installs its own handlers in between.
        try:
            self._handlers = {number: signal.signal(number, self._note) for number in STOPPING}
        except ValueError:  # not in the main thread (a notebook's executor, a test): Lightning's handling stays
            self._handlers = {}
        if self._handlers and compat.take_early_sigterm(trainer):  # while data and model were set up
            self.received = int(signal.SIGTERM)
        compat.forget_batch_that_never_began(trainer)
        for callback, patience in self._patience:
            callback.patience = patience

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received and signum == signal.SIGINT:
            signal.signal(signum, signal.default_int_handler)
            signal.raise_signal(signum)
        self.received = self.received or signum

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not at the end of the batch before: its metrics were not with the loggers yet.
        if self._leaving:
            self._leave(trainer)
        compat.set_logged_step(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not completes_step(trainer, batch_idx):
            return
        if at_the_end(trainer):
            trainer.should_stop = True  # makes Lightning validate after the last step
        else:
            self._leaving = self._agreed_signal(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_handlers()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _leave(self, trainer: L.Trainer) -> None:
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        saving = [callback for callback in callbacks if isinstance(callback, SavesBeforeLeaving)]
        for callback in saving:
            callback.save_before_leaving(trainer)
        # By all processes: one that leaves while another one is still writing has that one killed.
        getattr(trainer.strategy, "finish_saving", bool)()
        raise TrainingInterrupted(self._leaving, trainer.global_step, saved=bool(saving))

    def _agreed_signal(self, trainer: L.Trainer) -> int:
        """Return the signal that any process has received, or 0: all must leave after the same step."""
        if trainer.world_size == 1:
            return self.received
        received = torch.tensor(self.received, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def take_control(trainer: L.Trainer) -> None:
    """Add a RunControl behind a Trainer's callbacks, unless it has one; not later than in a callback's `setup`."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(callback, RunControl) for callback in callbacks):
        callbacks.append(RunControl())
