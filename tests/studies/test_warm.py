"""The process that trains in forks: as a process of its own trains, to the bit, and what becomes of locks and kills."""

import fcntl
import json
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest

import studies.warm
from core.errors import UserError
from studies.warm import WarmProcess
from tests.support.running import command_line, is_held, parent_of, stopping, with_text
from tests.support.runs import ROOT, python, scalars, tiny_job
from tests.support.waiting import wait_for

JOB = tiny_job("experiment=moe_spannorm", "callbacks.progress=null", "trainer.max_steps=4")
STAND_IN = """
import json, os, signal, sys, time
seen = {
    "modules": sorted(sys.modules),
    "arguments": sys.argv,
    "path": sys.path[0],
    "name": __name__,
    "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"],
    "threads": len(os.listdir("/proc/self/task")),
    "files": len(os.listdir("/proc/self/fd")),
    "handlers": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
}
print(json.dumps(seen), flush=True)
if "wait" in sys.argv:
    def leave(number, frame):
        print("stopped", flush=True)
        sys.exit(128 + number)
    signal.signal(signal.SIGTERM, leave)
    time.sleep(100)
sys.exit(3)
"""
"""A train.py that says what it finds, and then waits if it is told to."""
WAITING = "train.py wait"


@pytest.fixture(scope="module")
def standing_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmProcess]:
    """One of two threads whose train.py is STAND_IN."""
    root = tmp_path_factory.mktemp("root")
    (root / "studies").mkdir()
    copied = shutil.copy(ROOT / "studies/warm.py", root / "studies")
    (root / "train.py").write_text(STAND_IN)
    with mock.patch.object(studies.warm, "__file__", str(copied)):
        process = WarmProcess(2)
        yield process
        process.end()


def losses(folder: Path) -> dict[str, dict[int, float]]:
    return {tag: scalars(folder, tag) for tag in ("train/loss", "val/loss")}


def test_runs_one_after_the_other_have_the_bits_of_one_in_a_process_of_its_own(tmp_path: Path) -> None:
    warm = WarmProcess(1)
    for name in ("first", "second"):
        ended = warm.train([*JOB, f"run_dir={tmp_path / name}"])
        assert ended.returncode == 0, ended.stderr
    ended = warm.train(["optim.lr=fast"])
    assert ended.returncode == 2
    assert ended.stderr.startswith("Error: optim.lr")
    warm.end()
    assert python(tmp_path, str(ROOT / "train.py"), *JOB, f"run_dir={tmp_path / 'alone'}").code == 0
    found = losses(tmp_path / "alone")
    assert all(len(curve) > 0 for curve in found.values())
    assert losses(tmp_path / "first") == losses(tmp_path / "second") == found


def test_a_run_finds_all_imported_and_nothing_of_the_project(standing_in: WarmProcess) -> None:
    """A study takes hours, and each run has the files as they are when it begins."""
    arguments = [f"x={number}" for number in range(100_000)]  # more than a socket takes at once
    ended = standing_in.train(arguments)
    assert ended.returncode == 3
    seen = json.loads(ended.stdout)
    modules = {name.partition(".")[0] for name in seen["modules"]}
    of_the_project = {path.stem for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert {"core", "callbacks", "studies"} <= of_the_project
    assert {"torch", "lightning"} <= modules
    assert not modules & of_the_project
    assert seen["arguments"][1:] == arguments
    assert seen["path"] == str(Path(seen["arguments"][0]).parent)
    assert seen["name"] == "__main__"
    assert seen["OMP_NUM_THREADS"] == "2"
    assert seen["threads"] == 1
    assert "default_int_handler" in seen["handlers"][0]
    assert seen["handlers"][1:] == [str(signal.SIG_DFL)] * 2
    assert json.loads(standing_in.train(["again"]).stdout)["files"] == seen["files"], "files are left open"


def test_signals_to_all_are_the_runs(standing_in: WarmProcess, tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        training = pool.submit(standing_in.train, ["wait"], [lock])
        wait_for(lambda: bool(with_text(WAITING)))
        (run,) = with_text(WAITING)
        forking = parent_of(run)
        assert "studies/warm.py" in command_line(forking)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(forking, number)
        wait_for(lambda: signal.SIGTERM in stopping(run, "SigCgt"))
        os.kill(run, signal.SIGTERM)
        ended = training.result(timeout=60)
    assert ended.returncode == 128 + signal.SIGTERM
    assert ended.stdout.endswith("stopped\n")
    assert not is_held(tmp_path / "lock")
    assert standing_in.train(["the next one"]).returncode == 3
    assert Path(f"/proc/{forking}").exists(), "of the same process"


def test_where_what_forks_is_killed_the_run_counts_as_killed_and_keeps_its_lock(
    standing_in: WarmProcess, tmp_path: Path
) -> None:
    with (tmp_path / "lock").open("w") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        training = pool.submit(standing_in.train, ["wait"], [lock])
        wait_for(lambda: bool(with_text(WAITING)))
        (run,) = with_text(WAITING)
        os.kill(parent_of(run), signal.SIGKILL)
        assert training.result(timeout=60).returncode == -signal.SIGKILL
    assert is_held(tmp_path / "lock")
    os.kill(run, signal.SIGKILL)
    wait_for(lambda: not is_held(tmp_path / "lock"))
    assert standing_in.train(["the next one"]).returncode == 3, "of another process"


def test_where_it_cannot_begin_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "warm.py"
    broken.write_text("import no_such_package")
    monkeypatch.setattr(studies.warm, "__file__", str(broken))
    with pytest.raises(UserError, match=r"^the process that starts the runs ended by itself, exit code 1; why is said"):
        WarmProcess(1).train(["--help"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a process that is left
def test_an_answer_that_was_not_waited_for_is_not_the_next_runs(
    standing_in: WarmProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(studies.warm, "_line", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            standing_in.train(["first"])
    assert json.loads(standing_in.train(["second"]).stdout)["arguments"][1:] == ["second"]
