"""Says when steps take much longer than usual, and whether the machine is busy with something else."""

import os
import statistics
import time
from collections import deque
from typing import Any

import lightning as L
import torch

from core.cpu_use import CpuTimes, cpu_times, used_by_others
from core.steps import completes_step

IN_A_ROW, USUAL = 5, 20
"""Steps that have to be slow, and steps before them that say what is usual."""
TIMES, SECONDS = 2.0, 1.0
"""Slow is what takes so many times the usual; the slow ones together take so long at least, or nobody would wait."""
AGAIN = 600.0
"""Seconds between two lines on slow steps."""
AT_FIRST = 3.0
"""Seconds from the making of the callback on, after which it looks whether the machine has been busy all along."""
BUSY = 0.5
"""Processors that training's threads lack on a busy machine, at least."""


class SlowSteps(L.Callback):
    """Prints a line when five optimizer steps in a row each took more than twice what is usual, validation not counted.

    Usual is the median of all steps before them in this process. On a CPU the line says how busy other programs keep
    the machine and, where training has several threads, that one goes through more beside others (docs/decisions.md:
    idle threads). Where they do so from the start, no step is unusual: a line of its own then says it, once.
    """

    def __init__(self) -> None:
        self._usual: deque[float] = deque(maxlen=1000)
        self._latest: deque[float] = deque(maxlen=IN_A_ROW)
        self._began, self._spent = 0.0, 0.0
        self._said = -AGAIN
        self._at_first: CpuTimes | None = cpu_times()
        self._before_slow: CpuTimes | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._began = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        self._spent += now - self._began
        if not completes_step(trainer, batch_idx) or not trainer.is_global_zero:
            return
        on_cpu = trainer.strategy.root_device.type == "cpu"
        if self._at_first is not None and now - self._at_first.clock >= AT_FIRST:
            if on_cpu and (busy := describe_others(self._at_first)):
                print(busy, flush=True)
            self._at_first = None
        seconds, self._spent = self._spent, 0.0
        if len(self._latest) == IN_A_ROW:
            self._usual.append(self._latest[0])
        self._latest.append(seconds)
        if len(self._usual) < USUAL:
            return
        usual = statistics.median(self._usual)
        if seconds <= TIMES * usual:
            self._before_slow = None
            return
        if self._before_slow is None:
            self._before_slow = cpu_times()
        if sum(self._latest) >= SECONDS and min(self._latest) > TIMES * usual and now - self._said >= AGAIN:
            self._said = now
            line = f"step {trainer.global_step}: the last {IN_A_ROW} steps took "
            line += f"{statistics.mean(self._latest):.2g} s each, {usual:.2g} s is usual"
            busy = describe_others(self._before_slow) if on_cpu and self._before_slow is not None else ""
            print(line + (f"; {busy}" if busy else ""), flush=True)


def describe_others(before: CpuTimes) -> str:
    """Return how busy other programs have kept this machine since, and what helps; nothing where they leave enough."""
    now = cpu_times()
    if now is None or now.clock <= before.clock:
        return ""
    others, cores, threads = used_by_others(before, now), os.cpu_count() or 1, torch.get_num_threads()
    if threads - (cores - others) < BUSY:
        return ""
    advice = "; OMP_NUM_THREADS=1 trains faster beside others" if threads > 1 else ""
    return f"the machine is busy: other programs use {others:.1f} of {cores} cores{advice}"
