"""A long run takes no more memory than a short one, and many runs in one process leave nothing open."""

import gc
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

from core.event_files import event_files
from tests.support.runs import run, tiny_job, train

SCALARS_BYTES = 3_000  # in TensorBoard's files, at most, of a step that is logged: two blocks, one of them a mixture
HISTOGRAM_BYTES = 10_000  # of one histogram, of which there are as many as groups of parameters, and of their gradients


class Resident(L.Callback):
    """Notes this process' resident memory, in pages, every 500 steps."""

    pages: ClassVar[list[int]] = []  # for the test, which is the same process

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 500 == 0 and batch_idx > 0:
            self.pages.append(int(Path("/proc/self/statm").read_text().split()[1]))


def left_open() -> tuple[set[str], int, int]:
    """(what the file descriptors lead to, threads, child processes)."""
    gc.collect()  # a trainer and its loops refer to one another
    targets = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            targets.add(os.readlink(descriptor))
        except OSError:  # the one that read the folder
            continue
    return targets, threading.active_count(), len(multiprocessing.active_children())


def assert_events_are_small(run_dir: Path, num_logged: int, num_histograms: int) -> None:
    (path,) = event_files(run_dir)
    values = [value for raw in RawEventFileLoader(str(path)).Load() for value in Event.FromString(raw).summary.value]
    scalars = [value.ByteSize() for value in values if value.HasField("simple_value")]
    histograms = [value.ByteSize() for value in values if value.HasField("histo")]
    assert 0 < sum(scalars) < SCALARS_BYTES * num_logged
    assert len(histograms) == num_histograms
    assert max(histograms) < HISTOGRAM_BYTES


def assert_nothing_is_left(cwd: Path, num_runs: int) -> None:
    run(cwd, "first", "experiment=moe_spannorm")
    before = left_open()
    for number in range(num_runs):
        run(cwd, f"run-{number}", "experiment=moe_spannorm", "data.num_workers=1")
    assert left_open() == before


def test_runs_leave_nothing_open(tmp_path: Path) -> None:
    assert_nothing_is_left(tmp_path, 2)


def test_events_stay_small(tmp_path: Path) -> None:
    overrides = ["experiment=moe_spannorm", "callbacks.gradient_health.histogram_every_n_steps=10"]
    run(tmp_path, "run", *overrides, "trainer.max_steps=20", "trainer.log_every_n_steps=10")
    assert_events_are_small(tmp_path / "run", num_logged=2, num_histograms=2 * 24)


@pytest.mark.slow
def test_twenty_runs_leave_nothing_open(tmp_path: Path) -> None:
    assert_nothing_is_left(tmp_path, 20)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_five_thousand_steps_take_the_memory_of_five_hundred(tmp_path: Path) -> None:
    overrides = ["experiment=moe_spannorm", "callbacks.gradient_health.histogram_every_n_steps=100"]
    overrides += ["trainer.max_steps=5001", "+callbacks.resident._target_=tests.faults.test_leaks.Resident"]
    Resident.pages.clear()
    finished = train(tmp_path, *tiny_job(*overrides), "trainer.log_every_n_steps=10", "run_dir=run")
    assert finished.code == 0, finished.err
    assert len(Resident.pages) == 10
    assert max(Resident.pages) < 1.02 * Resident.pages[0]
    assert_events_are_small(tmp_path / "run", num_logged=501, num_histograms=50 * 24)
