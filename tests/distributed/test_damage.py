"""A checkpoint in pieces of which one is damaged is passed over for the one before, as a single file is."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from core.checkpoint import load, load_beside_weights
from core.sharded_checkpoint import damage
from tests.support.comparing import assert_equal
from tests.support.damage import flip, flip_bit, truncate
from tests.support.processes import command_line, together
from tests.support.runs import Finished, assert_began, tiny_job, train

LAST, PREVIOUS = "checkpoints/last.ckpt", "checkpoints/previous.ckpt"
PIECES = "rank-00001.safetensors"  # of the second process
STEPS = ["callbacks.last_checkpoint.every_n_train_steps=1", "optim.schedule=constant"]
GOING_ON = [*tiny_job(*STEPS, "trainer.max_steps=4"), "ckpt_path=last"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of three steps, by two processes."""
    folder = tmp_path_factory.mktemp("finished")
    two = tiny_job(*STEPS, "trainer=fsdp", "trainer.devices=2", "trainer.max_steps=3")
    for ((ended, *_),) in zip(together(2, folder, command_line, [[*two, "run_dir=run"]]), strict=True):
        assert ended.code == 0, ended.err
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def assert_passed_over(run: Path, ended: Finished) -> None:
    assert ended.code == 0, ended.err
    assert ended.err.startswith(f"{run.name}/{LAST} is damaged and passed over: ")
    assert_began(run, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (truncate, PIECES),
        (flip, PIECES),
        (flip, "index.json"),
        (flip, "meta.pt"),
        (Path.unlink, PIECES),
    ],
)
def test_one_process_passes_it_over(folder: Path, spoil: Any, name: str) -> None:
    spoil(folder / "run" / LAST / name)
    assert_passed_over(folder / "run", train(folder, *GOING_ON, "run_dir=run"))
    assert load_beside_weights(folder / "run" / PREVIOUS)["global_step"] == 3


def test_two_take_the_same_one_though_only_the_first_has_read_all(folder: Path) -> None:
    shutil.copytree(folder / "run", folder / "under_ddp")
    jobs = []
    for name, strategy in (("run", "fsdp"), ("under_ddp", "ddp")):
        flip(folder / name / LAST / PIECES)
        jobs.append([*GOING_ON, f"trainer={strategy}", "trainer.devices=2", f"run_dir={name}"])
    first, second = together(2, folder, command_line, jobs)
    for name, ended, other in zip(("run", "under_ddp"), first, second, strict=True):
        assert_passed_over(folder / name, ended)
        assert (other.code, other.err) == (0, "")


def test_one_that_is_named_itself_is_refused(folder: Path) -> None:
    flip(folder / "run" / LAST / PIECES)
    ended = train(folder, *tiny_job(*STEPS, "trainer.max_steps=4"), f"ckpt_path=run/{LAST}")
    assert ended.code == 2
    assert f"ckpt_path='run/{LAST}' is not valid: expected a whole checkpoint of this project ({PIECES}: " in ended.err


def test_any_flipped_bit_is_found_or_changes_nothing(folder: Path) -> None:
    checkpoint, draw = folder / "run" / LAST, random.Random(0)
    whole = load(checkpoint)
    assert damage(checkpoint, thorough=True) is None
    found = 0
    for path in sorted(checkpoint.iterdir()):
        for _ in range(12):
            bit = draw.randrange(8 * path.stat().st_size)
            flip_bit(path, bit)
            if damage(checkpoint, thorough=True):
                found += 1
            else:
                assert_equal(load(checkpoint), whole, f"{path.name}, bit {bit}")
            flip_bit(path, bit)
    assert found > 30
