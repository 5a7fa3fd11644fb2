"""Sets how OpenMP's idle threads wait: they look for work many times, then sleep; on a busy machine they sleep soon.

A thread that looks for work again and again takes a processor from whoever has some, the other threads of the same step
among them (docs/decisions.md, results/busy-cpu.md). torch's OpenMP reads the variable when torch is imported, so the
packages whose modules are started as commands import this one first. What is computed does not depend on it.
"""

import os
import time

from core.cpu_use import cpu_times, used_by_others

SPINS, SPINS_BESIDE_OTHERS = 100_000, 1_000
"""How often a thread looks for work before it sleeps."""
SECONDS = 0.1
"""So long it is looked whether other programs use the processors."""
BUSY = 0.3
"""Processors that the threads lack, beside other programs, at least."""


def spins(threads: int) -> int:
    """Return how often each of so many threads should look for work before it sleeps, by what others do just now."""
    before = cpu_times()
    if before is None:
        return SPINS
    time.sleep(SECONDS)
    now = cpu_times()
    if now is None:
        return SPINS
    lacking = threads + used_by_others(before, now) - (os.cpu_count() or 1)
    return SPINS_BESIDE_OTHERS if lacking >= BUSY else SPINS


def _threads() -> int:
    """Return how many threads OpenMP will have."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() else os.cpu_count() or 1


if "GOMP_SPINCOUNT" not in os.environ:
    os.environ["GOMP_SPINCOUNT"] = str(spins(_threads()) if _threads() > 1 else SPINS)
