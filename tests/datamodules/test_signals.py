"""Signals to all processes at once: those that read or tokenize leave them to the one that trains or prepares."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from core.signals import SENDER_KNOWN, STOPPING, held_back, ignore_stop_signals
from datamodules.preparation import encoding
from datamodules.samples import Numbers, Rows
from datamodules.stream import Batch, SampleStream, StreamLoader
from datamodules.tokenizers import ByteTokenizer
from tests.support.forked import python
from tests.support.preparing import TEXTS, alive, wait_for
from tests.support.rank_faults import send_from_outside
from tests.support.running import stopping
from tests.support.runs import ROOT, TRAIN, assert_began, load, run, scalars, tiny_job

only_where_sender_known = pytest.mark.skipif(not SENDER_KNOWN, reason="helpers get the signals as before")

STEPS = ["experiment=dense_spannorm", "optim.schedule=constant", "trainer.max_steps=3"]
STEPS += ["trainer.accumulate_grad_batches=8", "data.num_workers=2"]  # a step is more than what they have in stock


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return scalars(run(tmp_path_factory.mktemp("uninterrupted"), "run", *STEPS), "train/loss")


@pytest.mark.parametrize(
    "signum", [pytest.param(s, marks=[] if s == signal.SIGTERM else pytest.mark.slow) for s in STOPPING]
)
def test_a_run_saves_when_its_whole_group_is_stopped(
    signum: signal.Signals, tmp_path: Path, uninterrupted: dict[int, float]
) -> None:
    fault = f"+callbacks.fault={{_target_: tests.support.rank_faults.SignalGroup, signum: {int(signum)}, step: 2}}"
    finished = python(tmp_path, str(TRAIN), *tiny_job(*STEPS, fault, "run_dir=run"))
    assert finished.code == 128 + signum, finished.err
    assert f"Interrupted: {signum.name} after step 2. Saved; go on with" in finished.out
    assert "Traceback" not in finished.err
    assert load(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 2
    run(tmp_path, "run", *STEPS, "ckpt_path=last")
    assert_began(tmp_path / "run", 2)
    assert scalars(tmp_path / "run", "train/loss") == uninterrupted


class Zeros:
    def read(self, numbers: Numbers) -> Rows:
        return {"tokens": np.zeros((len(numbers), 9), np.int64)}


class Stuck(Zeros):
    """Samples of which no more come than the first batch."""

    def read(self, numbers: Numbers) -> Rows:
        if numbers.min() > 0:
            time.sleep(200)
        return super().read(numbers)


def stuck_loader() -> tuple[Iterator[Batch], BaseProcess]:
    """An iterator of which one process is asked for its second batch; and that process."""
    before = set(multiprocessing.active_children())
    batches = iter(StreamLoader(SampleStream(Stuck(), 1), batch_size=None, num_workers=1))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    return batches, worker


def test_its_parent_ends_a_loaders_process_and_nobody_else() -> None:
    _batches, worker = stuck_loader()
    for signum in STOPPING:
        send_from_outside(signum, worker.pid)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


def _train(told: Connection) -> None:
    _batches, worker = stuck_loader()
    told.send(worker.pid)
    signal.pause()


def test_a_loaders_process_ends_with_its_parent() -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    parent = context.Process(target=_train, args=(theirs,))
    parent.start()
    assert ours.poll(100)
    worker = ours.recv()
    parent.kill()
    parent.join()
    wait_for(lambda: not alive(str(worker)))


def _begin(told: Connection) -> None:
    told.send("before its first line")
    told.recv()
    ignore_stop_signals()
    signal.pause()


def test_a_process_that_only_begins_leaves_them_too() -> None:
    context = multiprocessing.get_context("fork")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    ours, theirs = context.Pipe()
    process = context.Process(target=_begin, args=(theirs,))
    with held_back():
        process.start()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    ours.recv()
    for signum in STOPPING:
        send_from_outside(signum, process.pid)
    ours.send("go on")
    process.join(0.5)
    assert process.is_alive()
    process.terminate()
    process.join(20)
    assert process.exitcode == 0


@only_where_sender_known
def test_a_loaders_processes_are_born_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.stream.ignore_stop_signals", lambda *_: None)
    before, mask = set(multiprocessing.active_children()), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    batches = iter(StreamLoader(SampleStream(Zeros(), 1, num_batches=4), batch_size=None, num_workers=2))
    next(batches)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    workers = [worker.pid for worker in set(multiprocessing.active_children()) - before]
    held = [stopping(pid, "SigBlk") for pid in workers if pid is not None]
    assert len(list(batches)) == 3  # to the end, which is theirs too
    assert held == [set(STOPPING)] * 2


@only_where_sender_known
def test_a_preparations_processes_are_born_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of tokens each returns what it holds back, and blocks no more: its unit is empty."""
    monkeypatch.setattr(encoding, "_start", id)
    monkeypatch.setattr(encoding, "_encode", partial(signal.pthread_sigmask, signal.SIG_BLOCK))
    (_, one), (_, other) = encoding.encode_all([[], []], ByteTokenizer(), 2)
    assert set(STOPPING) <= set(one) & set(other)


def _obedient() -> None:
    ignore_stop_signals()
    signal.pause()


def _fork_another_after_it(told: Connection) -> None:
    """The other has a copy of all that tells the first one that its parent is there."""
    context = multiprocessing.get_context("fork")
    first, other = context.Process(target=_obedient), context.Process(target=signal.pause)
    with held_back():
        first.start()
    other.start()
    told.send([first.pid, other.pid])
    signal.pause()


def _have_a_fork_server(told: Connection) -> None:
    """It bears the process, not held back, and outlives this one."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("forkserver"), initializer=ignore_stop_signals)
    told.send([pool.submit(os.getpid).result()])
    signal.pause()


@only_where_sender_known
@pytest.mark.slow
@pytest.mark.parametrize("start", [_fork_another_after_it, _have_a_fork_server])
def test_only_its_parents_end_ends_it(start: Callable[[Connection], None]) -> None:
    # Forked, it would take this process' fork server, if there is one, for its own.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    parent = context.Process(target=start, args=(theirs,))
    parent.start()
    started = []
    try:
        assert ours.poll(100)
        worker, *others = started = ours.recv()
        assert stopping(worker, "SigBlk") == set(STOPPING)
        for signum in STOPPING:
            os.kill(worker, signum)
        wait_for(lambda: signal.SIGTERM not in stopping(worker, "ShdPnd"))  # seen by its thread
        assert alive(str(worker))
        parent.kill()
        parent.join()
        wait_for(lambda: not alive(str(worker)))
        assert all(alive(str(other)) for other in others)
    finally:
        parent.kill()
        for pid in filter(alive, map(str, started)):
            os.kill(int(pid), signal.SIGKILL)


def test_ctrl_c_ends_a_preparation_in_several_processes_in_one_line(tmp_path: Path) -> None:
    """The last input is a pipe that nobody writes to, so that it is certainly at work."""
    lines = (json.dumps({"text": f"{n} {text}"}) + "\n" for n in range(15) for text in TEXTS)
    (tmp_path / "a.jsonl").write_text("".join(lines))
    os.mkfifo(tmp_path / "b.txt")
    arguments = [f"input={tmp_path}/a.jsonl,{tmp_path}/b.txt", f"output={tmp_path}/out", "processes=2"]
    with subprocess.Popen(
        [sys.executable, "-m", "tools.prepare", *arguments],
        cwd=ROOT,
        text=True,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # under nohup it is ignored
    ) as process:
        try:
            wait_for(lambda: (tmp_path / ".out.partial/progress.json").exists())
            os.killpg(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("Interrupted")
