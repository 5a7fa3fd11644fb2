"""What one process of several does: `+callbacks.fault._target_=...`."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from itertools import chain
from multiprocessing import active_children
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from core.errors import UserError
from core.run_control import RunControl


def send_from_outside(signum: int, *processes: int) -> None:
    """A process that is nobody's parent sends it; a group is the negative of its number."""
    code = "import os, sys; number, *processes = map(int, sys.argv[1:]); [os.kill(pid, number) for pid in processes]"
    command = [sys.executable, "-S", "-c", code, str(int(signum)), *map(str, processes)]
    subprocess.run(command, check=True, start_new_session=True)


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


class SignalGroup(SignalLast):
    """The whole group of processes gets it, as from a terminal."""

    def on_before_zero_grad(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step - 1 and trainer.global_rank == trainer.world_size - 1:
            send_from_outside(self.signum, -os.getpgrp())


class InterruptEarly(L.Callback):
    """The whole group gets a Ctrl-C before the first step."""

    def on_fit_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            send_from_outside(signal.SIGINT, -os.getpgrp())


class SignalLauncher(SignalLast):
    """The launcher gets it, and has handed it on before the step goes on."""

    def on_before_zero_grad(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step - 1:
            if trainer.global_rank == trainer.world_size - 1:
                os.kill(os.getppid(), self.signum)
            (control,) = (callback for callback in trainer.callbacks if isinstance(callback, RunControl))
            while not control.received:
                time.sleep(0.01)


class SignalAll(L.Callback):
    """All processes, those of data loaders too, get signals amid a step, as SLURM and torchrun have it."""

    def __init__(self, signals: list[int], step: int) -> None:
        self.signals, self.step = signals, step

    def on_before_zero_grad(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step - 1:
            processes: list[list[int]] = [[]] * trainer.world_size
            dist.all_gather_object(processes, [os.getpid(), *(child.pid for child in active_children())])
            if trainer.global_rank == trainer.world_size - 1:
                for signum in self.signals:
                    send_from_outside(signum, *chain(*processes))


class SmallFiles(L.Callback):
    """One process cannot write files of more than so many bytes."""

    def __init__(self, rank: int, num_bytes: int) -> None:
        self.rank, self.num_bytes = rank, num_bytes
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == self.rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.num_bytes, self.before[1]))

    def on_exception(self, *_: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


class NoRename(L.Callback):
    """The first process cannot give a checkpoint in pieces its name."""

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        def refuse(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        if trainer.is_global_zero:
            trainer.strategy._put_in_place = refuse


class SlowRename(L.Callback):
    """The first process takes its time over it."""

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        strategy, put_in_place = trainer.strategy, trainer.strategy._put_in_place

        def slow(*arguments: Any) -> None:
            time.sleep(1)
            put_in_place(*arguments)

        strategy._put_in_place = slow


class FailAll(L.Callback):
    """All fail amid a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_zero_grad(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step - 1:
            raise UserError("the first error")


class OwnNumbers(L.Callback):
    """Each process of a new run has other random numbers than the rest."""

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 0:
            torch.manual_seed(trainer.global_rank)


class NoteNumbers(L.Callback):
    """Each process leaves the state of its generator at the end."""

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        torch.save(torch.get_rng_state(), f"numbers-{trainer.global_rank}-of-{trainer.world_size}")
