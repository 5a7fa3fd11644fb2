"""Measures how many of the machine's processors are kept busy by other programs than this one."""

import os
import time
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
IDLE = (3, 4, 8, 9)
"""Places in /proc/stat's first line: idle, waiting for a disk, and what guests use, which others hold already."""


class CpuTimes(NamedTuple):
    """Holds seconds of processor time, counted from some moment on.

    Attributes:
        everybody: of all programs, and what a virtual machine's host took for others.
        own: of this process' group: its data loaders, the processes that it launched, and those it has waited for.
        clock: the time itself.
    """

    everybody: float
    own: float
    clock: float


def cpu_times() -> CpuTimes | None:
    """Return the processor time until now; None where Linux' /proc does not tell."""
    try:
        fields = (PROC / "stat").read_text().splitlines()[0].split()[1:]
        groups = [times for path in PROC.glob("[0-9]*/stat") if (times := _times_of(path)) is not None]
    except (OSError, IndexError):
        return None
    tick = os.sysconf("SC_CLK_TCK")
    everybody = sum(int(field) for place, field in enumerate(fields) if place not in IDLE)
    own = sum(ticks for group, ticks in groups if group == os.getpgrp())
    return CpuTimes(everybody / tick, own / tick, time.monotonic())


def used_by_others(before: CpuTimes, now: CpuTimes) -> float:
    """Return how many processors others have kept busy between the two, on average."""
    used = (now.everybody - before.everybody) - (now.own - before.own)
    return max(0.0, used / (now.clock - before.clock))


def _times_of(path: Path) -> tuple[int, int] | None:
    """Return a process' group, and the clock ticks that it and the children it has waited for have used."""
    try:
        # The name, in brackets, may hold anything; after it come state, parent, group; utime is the 12th.
        fields = path.read_text().rpartition(")")[2].split()
        return int(fields[2]), sum(map(int, fields[11:15]))
    except (OSError, IndexError, ValueError):  # it has ended meanwhile
        return None
