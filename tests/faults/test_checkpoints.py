"""A checkpoint that is damaged is never trained on: it is said, and the one before is taken."""

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.damage import flip, truncate
from tests.support.runs import assert_began, load, tiny_job, train

JOB = ["trainer.max_steps=3", "callbacks.last_checkpoint.every_n_train_steps=1"]
LAST, PREVIOUS = "run/checkpoints/last.ckpt", "run/checkpoints/previous.ckpt"


class Create:
    """What a hostile pickle does when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_the_last_two_are_kept(finished: Path) -> None:
    assert [load(finished / path)["global_step"] for path in (PREVIOUS, LAST)] == [2, 3]
    assert not list(finished.rglob("*.unfinished"))


@pytest.mark.parametrize(("spoil", "place"), [(flip, 0.5), (truncate, 0.5), (truncate, 0.0)])
def test_a_damaged_one_is_passed_over_for_the_one_before(cwd: Path, spoil: Any, place: float) -> None:
    spoil(cwd / LAST, place)
    resumed = train(cwd, *tiny_job(*JOB), "run_dir=run", "ckpt_path=last", "trainer.max_steps=4")
    assert resumed.code == 0, resumed.err
    assert resumed.err.startswith(f"{LAST} is damaged and passed over: ")
    assert_began(cwd / "run", 2)
    assert [load(cwd / path)["global_step"] for path in (PREVIOUS, LAST)] == [3, 4]


@pytest.mark.parametrize("path", ["last", LAST])
def test_its_checksums_are_read_once(cwd: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    testzip, read = zipfile.ZipFile.testzip, []
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda file: read.append(file) or testzip(file))
    resumed = train(cwd, *tiny_job(*JOB), "run_dir=run", f"ckpt_path={path}", "trainer.max_steps=4")
    assert resumed.code == 0, resumed.err
    assert len(read) == 1


def test_with_both_damaged_nothing_trains(cwd: Path) -> None:
    for path in (LAST, PREVIOUS):
        flip(cwd / path, 0.5)
    refused = train(cwd, *tiny_job(*JOB), "run_dir=run", "ckpt_path=last", "trainer.max_steps=4")
    assert refused.code == 2
    assert "ckpt_path='last' is not valid: expected a whole checkpoint in run/checkpoints" in refused.err


def test_a_pickle_with_code_in_it_is_refused(cwd: Path, tmp_path: Path) -> None:
    content = load(cwd / LAST)
    content["hyper_parameters"]["x"] = Create(tmp_path / "created")
    torch.save(content, cwd / "hostile.ckpt")
    torch.save(Create(tmp_path / "created"), cwd / "old.ckpt", _use_new_zipfile_serialization=False)
    for name in ("hostile.ckpt", "old.ckpt"):
        refused = train(cwd, *tiny_job(*JOB), f"ckpt_path={name}", "trainer.max_steps=4")
        assert refused.code == 2
        assert f"ckpt_path='{name}' is not valid: expected a whole checkpoint of this project" in refused.err
    shutil.copy(cwd / "hostile.ckpt", cwd / LAST)
    assert train(cwd, *tiny_job(*JOB), "run_dir=run", "ckpt_path=last", "trainer.max_steps=4").code == 0
    assert_began(cwd / "run", 2)
    assert not (tmp_path / "created").exists()
    torch.load(cwd / "hostile.ckpt", weights_only=False)
    assert (tmp_path / "created").exists(), "it would have"
