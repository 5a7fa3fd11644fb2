"""How idle threads wait goes by what others do: real processes that are busy, and a machine said to be quiet."""

import os
import subprocess
import sys

import pytest

from core import idle_threads
from core.cpu_use import CpuTimes
from core.idle_threads import SPINS, SPINS_BESIDE_OTHERS, spins
from tests.support.sources import ROOT

LOOK = "import os; import core; print(os.environ['GOMP_SPINCOUNT'])"


def seen(**environment: str) -> str:
    """What a process of several threads, or of those that are asked for, sets."""
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
    ended = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True, check=True
    )
    return ended.stdout.strip()


def test_beside_busy_processes_they_sleep_soon_unless_there_is_one_or_it_is_set() -> None:
    spin = [sys.executable, "-S", "-c", "while True: pass"]
    others = [subprocess.Popen(spin, start_new_session=True) for _ in range(os.cpu_count() or 1)]
    try:
        assert seen(OMP_NUM_THREADS="2") == str(SPINS_BESIDE_OTHERS)
        assert seen(OMP_NUM_THREADS="1") == str(SPINS)
        assert seen(OMP_NUM_THREADS="2", GOMP_SPINCOUNT="7") == "7"
    finally:
        for process in others:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("threads", "others", "expected"),
    [(4, 0.1, SPINS), (4, 0.5, SPINS_BESIDE_OTHERS), (2, 1.5, SPINS), (2, 2.5, SPINS_BESIDE_OTHERS)],
)
def test_it_goes_by_the_processors_that_are_left(
    threads: int, others: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([CpuTimes(5.0, 1.0, 10.0), CpuTimes(5.0 + others + 0.5, 1.5, 11.0)])
    monkeypatch.setattr(idle_threads, "cpu_times", lambda: next(times))
    monkeypatch.setattr(idle_threads, "SECONDS", 0.0)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert spins(threads) == expected


def test_where_nothing_is_known_the_machine_counts_as_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle_threads, "cpu_times", lambda: None)
    assert spins(4) == SPINS
