"""The process that trains in forks: as a process of its own trains, to the bit, and what becomes of locks and kills."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from core.status import read as status
from studies.warm import WarmProcess
from tests.support.runs import ROOT, python, scalars, tiny_job
from tests.support.waiting import wait_for

JOB = tiny_job("experiment=moe_spannorm", "callbacks.progress=null", "trainer.max_steps=4")


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmProcess]:
    process = WarmProcess(1)
    yield process
    process.end()


def losses(folder: Path) -> dict[str, dict[int, float]]:
    return {tag: scalars(folder, tag) for tag in ("train/loss", "val/loss")}


def holds(lock: Path) -> bool:
    """Return whether somebody holds the lock."""
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def command_line(process: int) -> str:
    return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def with_text(text: str) -> list[int]:
    """Return the processes that have the text in their command line."""
    found = []
    for process in processes():
        with suppress(FileNotFoundError, ProcessLookupError):
            found += [process] if text in command_line(process) else []
    return found


def test_runs_one_after_the_other_have_the_bits_of_one_in_a_process_of_its_own(
    warm: WarmProcess, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        ended = warm.train([*JOB, f"run_dir={tmp_path / name}"])
        assert ended.returncode == 0, ended.stderr
    assert python(tmp_path, str(ROOT / "train.py"), *JOB, f"run_dir={tmp_path / 'alone'}").code == 0
    found = losses(tmp_path / "alone")
    assert all(len(curve) > 0 for curve in found.values())
    assert losses(tmp_path / "first") == losses(tmp_path / "second") == found


def test_what_is_wrong_is_said_and_the_next_run_is_not_harmed(warm: WarmProcess) -> None:
    ended = warm.train(["optim.lr=fast"])
    assert ended.returncode == 2
    assert ended.stderr.startswith("Error: optim.lr")
    ended = warm.train(["--help"])
    assert ended.returncode == 0
    assert "train.py" in ended.stdout


@pytest.mark.slow
def test_nothing_of_the_project_is_imported_beforehand() -> None:
    """A study takes hours, and each run has the files as they are when it begins."""
    code = (
        "import runpy, sys; from importlib import import_module\n"
        "for name in runpy.run_path(sys.argv[1])['IMPORTED']: import_module(name)\n"
        "print(*sys.modules)"
    )
    ended = python(ROOT.parent, "-c", code, str(ROOT / "studies/warm.py"))
    of_the_project = {path.stem for path in ROOT.iterdir() if (path / "__init__.py").exists() or path.suffix == ".py"}
    assert {"core", "train"} <= of_the_project
    imported = {name.partition(".")[0] for name in ended.out.split()}
    assert "torch" in imported
    assert not imported & of_the_project


@pytest.mark.slow
def test_a_run_outlives_its_study_with_its_lock_and_what_forks_ends(tmp_path: Path) -> None:
    folder, lock = tmp_path / "run", tmp_path / "lock"
    code = (
        "import fcntl, sys; from studies.warm import WarmProcess\n"
        "lock = open(sys.argv[1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "WarmProcess(1).train(sys.argv[2:], [lock])"
    )
    job = [*JOB, f"run_dir={folder}", "trainer.max_steps=100000"]
    study = subprocess.Popen([sys.executable, "-c", code, str(lock), *job], cwd=ROOT)
    try:
        wait_for(lambda: status(folder).get("status") == "running")
        (run,) = (process for process in with_text(str(folder)) if process != study.pid)
        assert f"train.py {JOB[0]}" in command_line(run)
        forking = parent_of(run)
    finally:
        study.kill()
        study.wait()
    assert holds(lock)
    assert command_line(run)
    os.kill(run, signal.SIGKILL)
    wait_for(lambda: not holds(lock))
    wait_for(lambda: not Path(f"/proc/{forking}").exists())


@pytest.mark.slow
def test_where_what_forks_is_killed_the_run_counts_as_killed_and_the_next_has_another(warm: WarmProcess) -> None:
    assert warm.train(["--help"]).returncode == 0
    (forking,) = (process for process in with_text("studies/warm.py") if parent_of(process) == os.getpid())
    os.kill(forking, signal.SIGKILL)
    assert warm.train(["--help"]).returncode == -signal.SIGKILL
    assert warm.train(["--help"]).returncode == 0
