"""Disks that are full, folders that vanish, two at a time: a clear line, and what was saved stays whole."""

import os
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from core.atomic_write import damage
from core.errors import ConfigError
from core.run_lock import held
from tests.support.holder import holder
from tests.support.runs import load, tiny_job, train

JOB = ["trainer.max_steps=4", "callbacks.last_checkpoint.every_n_train_steps=1"]


class At(L.Callback):
    """Before step 3 something happens to the run's folder.

    Args:
        what: full: the next checkpoint's disk; gone: the whole folder; unwritable: its checkpoints' folder.
    """

    def __init__(self, what: str, run_dir: str) -> None:
        self.what, self.run_dir = what, Path(run_dir)
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step != 2:
            return
        if self.what == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, self.before[1]))
        elif self.what == "gone":
            shutil.rmtree(self.run_dir)
            self.run_dir.write_text("something else")  # so that nobody makes it again
        else:  # root may write anywhere: only what is no folder stops it
            shutil.move(self.run_dir / "checkpoints", self.run_dir / "moved")
            (self.run_dir / "checkpoints").write_text("")

    def on_exception(self, *_: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def at(what: str) -> str:
    return f"+callbacks.at={{_target_: tests.faults.test_folders.At, what: {what}, run_dir: run}}"


def test_a_disk_that_is_full_costs_no_checkpoint(tmp_path: Path) -> None:
    ended = train(tmp_path, *tiny_job(*JOB), "run_dir=run", at("full"))
    assert ended.code == 2
    assert "last.ckpt could not be written (File too large); what was there under this name is untouched" in ended.err
    assert ended.err.count("\n") == 1
    assert load(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 1
    assert train(tmp_path, *tiny_job(*JOB), "run_dir=run", "ckpt_path=last").code == 0
    assert load(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 4


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    ended = train(tmp_path, *tiny_job(*JOB), "run_dir=run", at("gone"))
    assert ended.code == 2
    assert ended.err.startswith("Error: ")
    assert "run" in ended.err
    assert ended.err.count("\n") == 1


def test_checkpoints_that_cannot_be_written_any_more_are_not_lost(tmp_path: Path) -> None:
    ended = train(tmp_path, *tiny_job(*JOB), "run_dir=run", at("unwritable"))
    assert ended.code == 2
    assert "run cannot be written to any more: Not a directory. Checkpoints in it are whole" in ended.err
    assert damage(tmp_path / "run/moved/last.ckpt") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_on_a_small_disk_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        ended = train(tmp_path, *tiny_job(*JOB, "model.dim=64"), "run_dir=disk/run")
        assert ended.code == 2, ended.err
        assert "No space left on device" in ended.err
        assert ended.err.count("\n") == 1
        for checkpoint in (disk / "run/checkpoints").glob("*.ckpt"):
            assert damage(checkpoint) is None
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_second_of_two_runs_in_one_folder_is_told(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as first:
        second = train(tmp_path, *tiny_job(), "run_dir=run")
        with pytest.raises(ConfigError, match="a folder in which no other process trains"):
            held(tmp_path / "run").__enter__()
        first.kill()
    assert second.code == 2
    assert "run_dir='run' is not valid: expected a folder in which no other process trains" in second.err
    assert train(tmp_path, *tiny_job(), "run_dir=run").code == 0, "a dead one holds nothing"


def test_what_is_refused_once_the_trainer_runs_leaves_no_folder(tmp_path: Path) -> None:
    refused = train(tmp_path, *tiny_job("experiment=moe_spannorm", "model.moe.expert_parallel=2"), "run_dir=run")
    assert refused.code == 2
    assert "model.moe.expert_parallel=2 is not valid" in refused.err
    assert not (tmp_path / "run").exists()


def test_a_sweep_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    refused = train(tmp_path, "-m", *tiny_job("model.num_heads=0,3"))
    assert refused.code == 2
    assert "\n2 of 2 runs of the sweep failed:\n" in refused.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
