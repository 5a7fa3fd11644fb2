"""Two processes that want one folder: one gets it, whenever they look, and no folder holds parts of two runs."""

import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from omegaconf import OmegaConf

from tests.support.racing import racing
from tests.support.runs import TRAIN, load, run, tiny_job, train

IMPORTS = """
from omegaconf import OmegaConf
from core import run_folder
run_folder.is_main_process = lambda: True  # as it is: to find that out takes the seconds that Lightning's import does
"""
CLAIM = """
config = OmegaConf.create({"run_dir": None, "ckpt_path": None})
for number in range(50):
    with run_folder.entered(config, "moe", f"run_{number}") as run:
        (run.path / "config.yaml").touch()  # it holds a run from now on
        print(run.path, flush=True)
"""


def test_no_name_is_given_twice(tmp_path: Path) -> None:
    """Two processes ask for the same fifty names at the same time."""
    with racing(tmp_path, IMPORTS, CLAIM, "a", "b") as processes:
        names = [name for process in processes for name in process.communicate(timeout=100)[0].split()]
    assert len(names) == len(set(names)) == 100
    assert {Path(name).name for name in names} >= {"run_0", "run_0-2"}


class Wait(L.Callback):
    """Takes the time that data take to prepare: until somebody says go."""

    def __init__(self) -> None:
        Path("preparing").touch()
        while not Path("go").exists():
            time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("resume", [False, True])
def test_who_prepares_has_the_folder_already(resume: bool, tmp_path: Path) -> None:
    """Else the second run would finish meanwhile, and the first one write over it."""
    going_on = []
    if resume:
        run(tmp_path, "run")
        going_on = ["ckpt_path=last", "trainer.max_steps=3"]
    job = tiny_job("run_dir=run", *going_on)
    waiting = [sys.executable, str(TRAIN), *job, "+callbacks.wait._target_=tests.faults.test_claims.Wait"]
    first = subprocess.Popen(waiting, cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        while not (tmp_path / "preparing").exists():
            assert first.poll() is None
            time.sleep(0.05)
        second = train(tmp_path, *job, *([] if resume else ["seed=2"]))
        assert second.code == 2
        assert second.err == "Error: run_dir='run' is not valid: expected a folder in which no other process trains\n"
        (tmp_path / "go").touch()
        assert first.wait(timeout=200) == 0
    finally:
        first.kill()
    assert OmegaConf.load(tmp_path / "run/config.yaml").seed == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == (3 if resume else 2)
    assert load(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == (3 if resume else 2)


ROUTER = ["model.moe.normalize_weights=true", "model.moe.top_k=1"]
"""Which is found out when the loggers are at work already."""


@pytest.mark.filterwarnings("ignore")
def test_what_is_refused_once_a_checkpoint_is_loaded_leaves_everything_as_it_was(tmp_path: Path) -> None:
    """The Trainer stands at the checkpoint's step then, and not at 0."""
    run(tmp_path, "run")
    status = (tmp_path / "run/status.json").read_text()
    names = {path.name for path in (tmp_path / "run").iterdir()}
    wrong = ["logger=[]", "+callbacks.lr._target_=lightning.pytorch.callbacks.LearningRateMonitor"]
    for folder in ("run", "other"):
        job = tiny_job("ckpt_path=run/checkpoints/last.ckpt", "trainer.max_steps=3", f"run_dir={folder}")
        refused = train(tmp_path, *job, *wrong)
        assert refused.code == 2
        assert "no logger" in refused.err
    assert not (tmp_path / "other").exists()
    assert (tmp_path / "run/status.json").read_text() == status, "the run has ended well, and still has"
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    assert train(tmp_path, *job).code == 0


def test_what_cannot_be_written_down_leaves_nothing(tmp_path: Path) -> None:
    """A reference that leads nowhere, in a part of the configuration that nothing is made of."""
    refused = train(tmp_path, *tiny_job("+foo=${nothing}"))
    assert refused.code == 2
    assert "foo='${nothing}' is not valid" in refused.err
    assert not list(tmp_path.iterdir())


def test_what_is_refused_leaves_a_folder_of_the_user_as_it_was(tmp_path: Path) -> None:
    """Also where that is found only once the Trainer runs; the corrected command then works."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    for wrong in (["model.num_heads=3"], ["model.moe.expert_parallel=2"], ROUTER, ["+foo=${nothing}"]):
        refused = train(tmp_path, *tiny_job("experiment=moe_spannorm", *wrong), "run_dir=run")
        assert refused.code == 2
        assert wrong[0].partition("=")[0].lstrip("+") in refused.err
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    assert train(tmp_path, *tiny_job(), "run_dir=run").code == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no such host"), RuntimeError("a bug")])
def test_what_ends_before_it_begins_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Any) -> None:
        raise error

    monkeypatch.setattr("datamodules.token_datamodule.TokenDataModule.check", broken)
    with suppress(OSError, RuntimeError):
        assert train(tmp_path, *tiny_job()).code == 130
    assert not list(tmp_path.iterdir())
