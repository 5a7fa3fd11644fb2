"""Says when steps take much longer than usual, and whether the machine is busy with something else."""

import os
import statistics
import time
from collections import deque
from typing import Any

import lightning as L
import torch

from core.steps import completes_step

IN_A_ROW, USUAL = 5, 20
"""Steps that have to be slow, and steps before them that say what is usual."""
TIMES, SECONDS = 2.0, 1.0
"""Slow is what takes so many times the usual; the slow ones together take so long at least, or nobody would wait."""
AGAIN = 600.0
"""Seconds between two lines."""


class SlowSteps(L.Callback):
    """Prints a line when five optimizer steps in a row each took more than twice what is usual, validation not counted.

    Usual is the median of all steps before them in this process. On a CPU the line says how busy the machine is and,
    where training has several threads, that one goes through more beside others (docs/decisions.md: idle threads).
    """

    def __init__(self) -> None:
        self._usual: deque[float] = deque(maxlen=1000)
        self._latest: deque[float] = deque(maxlen=IN_A_ROW)
        self._began, self._spent = 0.0, 0.0
        self._said = -AGAIN

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._began = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._spent += time.monotonic() - self._began
        if not completes_step(trainer, batch_idx):
            return
        seconds, self._spent = self._spent, 0.0
        if len(self._latest) == IN_A_ROW:
            self._usual.append(self._latest[0])
        self._latest.append(seconds)
        if len(self._usual) < USUAL or sum(self._latest) < SECONDS:
            return
        usual = statistics.median(self._usual)
        if min(self._latest) > TIMES * usual and time.monotonic() - self._said >= AGAIN and trainer.is_global_zero:
            self._said = time.monotonic()
            line = f"step {trainer.global_step}: the last {IN_A_ROW} steps took "
            line += f"{statistics.mean(self._latest):.2g} s each, {usual:.2g} s is usual"
            print(line + (describe_load() if trainer.strategy.root_device.type == "cpu" else ""), flush=True)


def describe_load() -> str:
    """Return, as the end of a sentence, how busy this machine is, if it is, and what helps; else nothing."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores:
        return ""
    advice = "; OMP_NUM_THREADS=1 trains faster beside others" if torch.get_num_threads() > 1 else ""
    return f"; the machine is busy: {load:.1f} processes want to run on {cores} cores{advice}"
