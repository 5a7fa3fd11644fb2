"""Steps that take longer than usual, on a clock of the test's own."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from callbacks.console import slow_steps
from callbacks.console.slow_steps import SlowSteps, describe_load


def go_through(callback: SlowSteps, steps: list[float], monkeypatch: pytest.MonkeyPatch, device: str = "cpu") -> None:
    """Call its hooks as a Trainer does, with two batches a step and a long validation behind each."""
    now = 100.0
    monkeypatch.setattr(slow_steps.time, "monotonic", lambda: now)
    trainer: Any = SimpleNamespace(accumulate_grad_batches=2, is_last_batch=False, is_global_zero=True, global_step=0)
    trainer.strategy = SimpleNamespace(root_device=torch.device(device))
    module: Any = None
    for number, seconds in enumerate(steps):
        for batch in (0, 1):
            callback.on_train_batch_start(trainer, module, None, 2 * number + batch)
            now += seconds / 2
            trainer.global_step = number + batch
            callback.on_train_batch_end(trainer, module, None, None, 2 * number + batch)
        now += 50.0


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([0.4] * 30 + [1.2] * 5, "step 35: the last 5 steps took 1.2 s each, 0.4 s is usual\n"),
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
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.0, 0.0))
    go_through(SlowSteps(), steps, monkeypatch)
    assert capsys.readouterr().out == said


def test_it_says_that_the_machine_is_busy_and_what_helps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (3.25, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    steps = [0.4] * 30 + [1.2] * 5
    go_through(SlowSteps(), steps, monkeypatch)
    busy = "the machine is busy: 3.2 processes want to run on 2 cores"
    assert capsys.readouterr().out.endswith(f"usual; {busy}; OMP_NUM_THREADS=1 trains faster beside others\n")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert describe_load() == f"; {busy}"
    go_through(SlowSteps(), steps, monkeypatch, device="meta")
    assert capsys.readouterr().out.endswith("is usual\n"), "another device's load is another one"
