"""One run a GPU: which there are, how many a run trains on, and that nobody else has them meanwhile."""

import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from core.errors import ConfigError
from core.interruption import PEER_LOST
from core.memory import LACK, explain_lack
from studies import devices, run
from studies.devices import gpus_wanted, taken, visible_gpus
from studies.grid import Planned
from studies.record import Record
from studies.warm import Ended
from tests.support.composing import composed

PLANNED = Planned("one", {}, 0, ("trainer.max_steps=1",))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(devices, "POLL_SECONDS", 0.01)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, ["0", "1", "2"]), ("", []), ("-1", []), ("3", ["3"]), ("2, 0", ["2", "0"]), ("GPU-8f1a", ["GPU-8f1a"])],
)
def test_those_that_are_visible(given: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_gpus() == expected


@pytest.mark.parametrize(
    ("overrides", "visible", "expected"),
    [
        ([], 0, 0),
        ([], 4, 1),
        (["trainer=cpu"], 4, 0),
        (["trainer=gpu"], 4, 1),
        (["trainer=gpu"], 0, "trainer.devices=1 is not valid: expected at most 0, the GPUs of this machine"),
        (["study_scale=paper"], 4, 4),
        (["study_scale=paper", "trainer.devices=8"], 8, 8),
        (["study_scale=paper", "trainer.devices=8"], 4, "trainer.devices=8 is not valid: expected at most 4"),
        (["trainer=gpu", "trainer.devices=[0,1]"], 4, 2),
    ],
)
def test_how_many_a_run_trains_on(overrides: list[str], visible: int, expected: int | str) -> None:
    trainer, names = composed(*overrides).trainer, [str(number) for number in range(visible)]
    if isinstance(expected, int):
        assert gpus_wanted(trainer, names) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            gpus_wanted(trainer, names)


def test_each_has_its_own_and_the_next_one_waits() -> None:
    order: list[str] = []

    def wait(number: int) -> None:
        with taken(number, ["0", "1"]) as variables:
            order.append(variables["CUDA_VISIBLE_DEVICES"])

    with taken(1, ["0", "1"]) as first:
        with taken(1, ["0", "1"]) as second:
            assert (first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]) == ("0", "1")
            both, one = (threading.Thread(target=wait, args=(number,)) for number in (2, 1))
            both.start()
            both.join(0.1)
            one.start()
            one.join(0.1)
            assert order == []
        both.join(0.1)
        assert order == [], "the one that is free is kept for it"
    both.join(10)
    one.join(10)
    assert order == ["1,0", "0"] or order == ["0,1", "0"]


def test_a_training_process_that_outlives_its_study_keeps_its_gpu(tmp_path: Path) -> None:
    with taken(1, ["0"]):
        training = subprocess.Popen(["sleep", "60"], close_fds=False)
    (lock,) = tmp_path.glob("*/0.lock")
    try:
        assert devices._lock(lock) is None
    finally:
        training.kill()
        training.wait()
    again = devices._lock(lock)
    assert again is not None
    again.close()


def test_in_an_allocation_of_slurm_too_and_each_job_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with taken(1, ["0", "1"]) as first, taken(1, ["0", "1"]) as second:
        assert [one["CUDA_VISIBLE_DEVICES"] for one in (first, second)] == ["0", "1"]
        monkeypatch.setenv("SLURM_JOB_ID", "8")  # whose 0 is another one
        with taken(1, ["0"]) as other:
            assert other["CUDA_VISIBLE_DEVICES"] == "0"


def test_a_part_of_a_gpu_has_slashes_in_its_name() -> None:
    with taken(1, ["MIG-GPU-8f1a/1/0"]) as variables:
        assert variables["CUDA_VISIBLE_DEVICES"] == "MIG-GPU-8f1a/1/0"


def ended(code: int, error: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Record | str, dict[str, Any]]:
    """What becomes of a run whose process ends so, on a machine of two GPUs, and how that was called."""
    called: dict[str, Any] = {}

    def call(command: list[str], **options: Any) -> Any:
        called.update(options, command=command)
        return SimpleNamespace(returncode=code, stderr=error, stdout="")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setattr(run.subprocess, "run", call)
    with open(os.devnull) as lock:
        return run.train(PLANNED, Path("nowhere"), 1, lock), called


@pytest.mark.parametrize("code", [-9, 130, 137, 143, PEER_LOST])
def test_a_run_that_was_killed_is_no_result(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    record, called = ended(code, "Process 0 stops: another one is gone", monkeypatch)
    assert record == "killed; start the study again and it resumes"
    assert called["env"]["CUDA_VISIBLE_DEVICES"] == "4"
    assert "blocks=all" in called["command"], "whose curves records are made of"
    assert not called["close_fds"]


def test_neither_is_one_that_had_not_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    lack = explain_lack(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    record, _ = ended(2, f"Epoch 0\nError: {lack}", monkeypatch)
    assert isinstance(record, str)
    assert record.startswith(f"no result, {LACK} (CUDA out of memory. Tried to allocate 2.00 GiB.); data.batch_size")


def test_neither_is_one_that_was_refused_as_on_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    record, _ = ended(2, "Error: data.root='data' is not valid: expected a folder", monkeypatch)
    said = "data.root='data' is not valid: expected a folder"
    assert record == f"no result, {said}; start the study again and it is run again"


def test_a_crash_is_a_failure_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    record, _ = ended(1, "Traceback (most recent call last):\nRuntimeError: out of luck", monkeypatch)
    assert isinstance(record, Record)
    assert (record.status, record.reason) == ("broken", "RuntimeError: out of luck")


@pytest.mark.parametrize(
    ("overrides", "gpus", "platform", "forked"),
    [
        ((), "", "linux", True),
        (("trainer.devices=1",), "", "linux", True),
        (("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"), "", "linux", False),
        (("trainer.accelerator=gpu",), "0", "linux", False),
        (("trainer.accelerator=cpu",), "0", "linux", True),
        ((), "", "darwin", False),
    ],
)
def test_what_is_one_process_on_a_cpu_is_forked(
    overrides: tuple[str, ...], gpus: str, platform: str, forked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA does not survive a fork, and of several processes all are to be waited for."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    monkeypatch.setattr(sys, "platform", platform)
    command = mock.Mock(return_value=SimpleNamespace(returncode=-9, stderr="", stdout=""))
    warm = mock.Mock(**{"train.return_value": Ended(-9, "", "")})
    monkeypatch.setattr(run.subprocess, "run", command)
    monkeypatch.setattr(run, "warm_process", lambda threads: warm)
    with open(os.devnull) as lock:
        run.train(replace(PLANNED, overrides=overrides), Path("nowhere"), 1, lock)
    assert (warm.train.called, command.called) == (forked, not forked)
    if forked:
        assert warm.train.call_args.args[1] == [lock]
