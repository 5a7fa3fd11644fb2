"""Processor time of others: a /proc written by hand, and real processes of this group and of another."""

import os
import sys
from pathlib import Path

import pytest

from core import cpu_use
from core.cpu_use import CpuTimes, cpu_times, used_by_others
from tests.support.runs import python
from tests.support.sources import ROOT

MEASURE = """
import subprocess, sys
from core.cpu_use import cpu_times

spin = "import time\\nwhile time.process_time() < 0.4: pass\\nprint(flush=True); time.sleep(60)"
before = cpu_times()
process = subprocess.Popen([sys.executable, "-S", "-c", spin], stdout=subprocess.PIPE, start_new_session=%r)
process.stdout.readline()
now = cpu_times()
process.kill()
print(now.everybody - before.everybody, now.own - before.own)
"""


def write(proc: Path, pid: str, name: str, group: int, *ticks: int) -> None:
    (proc / pid).mkdir(parents=True, exist_ok=True)
    zeros = " ".join("0" for _ in range(8))
    (proc / pid / "stat").write_text(f"{pid} ({name}) R 1 {group} {zeros} {' '.join(map(str, ticks))} 20 0 1\n")


def test_what_proc_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_use, "PROC", tmp_path)
    tick, own = os.sysconf("SC_CLK_TCK"), os.getpgrp()
    # user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice
    (tmp_path / "stat").write_text("cpu  100 20 30 9000 900 1 2 7 50 10\ncpu0 1 1\n")
    write(tmp_path, "1", "init", own + 1, 5, 5, 5, 5)
    write(tmp_path, "20", "a ) R 1 7 (b", own, 10, 20, 3, 4)
    write(tmp_path, "21", "python", own, 1, 1, 0, 0)
    (tmp_path / "22").mkdir()  # it has ended
    (tmp_path / "self").mkdir()
    times = cpu_times()
    assert times is not None
    assert (round(times.everybody * tick), round(times.own * tick)) == (160, 39)


@pytest.mark.parametrize("text", [None, "", "cpu\n"])
def test_where_there_is_no_proc_nothing_is_known(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_use, "PROC", tmp_path)
    if text is not None:
        (tmp_path / "stat").write_text(text)
    times = cpu_times()
    assert times is None or times.everybody == 0


def test_what_others_use_is_the_rest() -> None:
    assert used_by_others(CpuTimes(100, 40, 7.0), CpuTimes(108, 43, 9.0)) == 2.5
    assert used_by_others(CpuTimes(100, 40, 7.0), CpuTimes(102, 43, 9.0)) == 0, "clocks of different grain"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux' /proc")
@pytest.mark.parametrize("own", [True, False])
def test_a_process_that_runs_counts_by_its_group(own: bool) -> None:
    finished = python(ROOT, "-c", MEASURE % (not own))
    assert finished.code == 0, finished.err
    everybody, ours = map(float, finished.out.split())
    assert everybody > 0.35
    assert (ours > 0.35) == own
