"""Steps that take longer than usual, on a clock of the test's own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from callbacks.console import slow_steps
from callbacks.console.slow_steps import AT_FIRST, SlowSteps
from core.cpu_use import CpuTimes
from tests.support.runs import tiny_job, train

SLOW = [0.4] * 30 + [1.2] * 5


class Clock:
    """A machine whose other programs use a number of its processors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, others: float = 0.0, cores: int = 2, threads: int = 2) -> None:
        self.now, self.used, self.others = 100.0, 0.0, others
        monkeypatch.setattr(slow_steps.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(slow_steps, "cpu_times", lambda: CpuTimes(self.used, 0.0, self.now))
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    def pass_by(self, seconds: float) -> None:
        self.now += seconds
        self.used += self.others * seconds


def go_through(clock: Clock, callback: SlowSteps, steps: list[float], device: str = "cpu") -> None:
    """Call its hooks as a Trainer does, with two batches a step and a long validation behind each."""
    trainer: Any = SimpleNamespace(accumulate_grad_batches=2, is_last_batch=False, is_global_zero=True, global_step=0)
    trainer.strategy = SimpleNamespace(root_device=torch.device(device))
    module: Any = None
    for number, seconds in enumerate(steps):
        for batch in (0, 1):
            callback.on_train_batch_start(trainer, module, None, 2 * number + batch)
            clock.pass_by(seconds / 2)
            trainer.global_step = number + batch
            callback.on_train_batch_end(trainer, module, None, None, 2 * number + batch)
        clock.pass_by(50.0)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (SLOW, "step 35: the last 5 steps took 1.2 s each, 0.4 s is usual\n"),
        ([0.4] * 30 + [1.2] * 4 + [0.4] * 5, ""),
        ([0.4] * 30 + [0.7] * 9, ""),
        ([0.4] * 15 + [1.2] * 9, ""),
        ([0.01] * 30 + [0.1] * 5, ""),
        ([0.4] * 30 + [1.2] * 10, "step 35: the last 5 steps took 1.2 s each, 0.4 s is usual\n"),
    ],
    ids=["slow", "too few", "not slow enough", "nothing is usual yet", "nobody waits", "once"],
)
def test_a_line_says_that_steps_are_slow(
    steps: list[float], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    go_through(Clock(monkeypatch), SlowSteps(), steps)
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("others", "threads", "device", "said"),
    [
        (1.0, 2, "cpu", "the machine is busy: other programs use 1.0 of 2 cores; OMP_NUM_THREADS=1 trains faster"),
        (1.6, 1, "cpu", "the machine is busy: other programs use 1.6 of 2 cores\n"),
        (1.0, 1, "cpu", ""),
        (0.3, 2, "cpu", ""),
        (1.6, 2, "meta", ""),
    ],
    ids=["busy", "for one thread too", "a core is left", "hardly", "another device's load is another one"],
)
def test_a_machine_that_is_busy_from_the_start_is_said_once(
    others: float,
    threads: int,
    device: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock(monkeypatch, others, threads=threads)
    callback = SlowSteps()
    clock.pass_by(AT_FIRST)
    go_through(clock, callback, [0.4] * 40, device)
    out = capsys.readouterr().out
    assert out.startswith(said)
    assert out.count("\n") == bool(said)


def test_slow_steps_are_laid_on_others_that_came_with_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not on those that were there before, as a load of the last minute would have it."""
    for others, busy in (((0.0, 1.2), "; the machine is busy: other programs use 1.2 of 2 cores"), ((0.4, 0.0), "")):
        clock = Clock(monkeypatch, others[0])
        callback = SlowSteps()
        go_through(clock, callback, SLOW[:30])
        clock.others = others[1]
        go_through(clock, callback, SLOW[30:])
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"step 5: the last 5 steps took 1.2 s each, 0.4 s is usual{busy}")
        assert ("busy" in line) == bool(busy)


@pytest.fixture
def busy_machine() -> Iterator[None]:
    """Another program on each core, in a group of its own."""
    spin = [sys.executable, "-S", "-c", "while True: pass"]
    programs = [subprocess.Popen(spin, start_new_session=True) for _ in range(os.cpu_count() or 1)]
    yield
    for program in programs:
        program.kill()
        program.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux' /proc")
def test_a_run_on_a_busy_machine_says_so(busy_machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_steps, "AT_FIRST", 0.3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: os.cpu_count())
    finished = train(tmp_path, *tiny_job("run_dir=run", "trainer.max_steps=20"))
    assert finished.code == 0, finished.err
    assert finished.out.count("the machine is busy: other programs use") == 1
