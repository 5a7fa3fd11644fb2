"""train.py with trainer=fsdp and experts shared out: two processes train, save and resume as one process does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.checkpoint import load
from tests.helpers_run import TRAIN, run, scalars, tiny_job

JOB = ["experiment=moe_spannorm", "model.moe.balancing=bias", "optim.schedule=constant", "run_dir=run"]
TWO = ["trainer=fsdp", "trainer.devices=2", "model.moe.expert_parallel=2"]


def run_two(cwd: Path, *arguments: str) -> None:
    """Two processes, which Lightning launches."""
    command = [sys.executable, str(TRAIN), *tiny_job(*TWO, *JOB, *arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr


def test_two_processes_train_save_and_resume_as_one(tmp_path: Path) -> None:
    one = run(tmp_path, "one", *JOB[:-1], "trainer.max_steps=4")
    run_two(tmp_path, "trainer.max_steps=2")
    two, expected = tmp_path / "run", load(one / "checkpoints/last.ckpt")["state_dict"]
    assert (two / "checkpoints/last.ckpt").is_dir()

    (tmp_path / "copy").symlink_to(two)  # the same checkpoint goes on in one process
    checkpoint = "copy/checkpoints/last.ckpt"
    alone = run(tmp_path, "alone", *JOB[:-1], "trainer.max_steps=4", f"ckpt_path={checkpoint}")
    run_two(tmp_path, "trainer.max_steps=4", "ckpt_path=last")
    for folder, first in ((two, 0), (alone, 2)):
        for tag in ("train/loss", "moe/max_load", "optim/grad_norm"):
            wanted = {step: value for step, value in scalars(one, tag).items() if step >= first}
            assert scalars(folder, tag) == pytest.approx(wanted, rel=1e-4), tag
        weights = load(folder / "checkpoints/last.ckpt")["state_dict"]
        biases = {name: bias.tolist() for name, bias in expected.items() if name.endswith("expert_bias")}
        assert {name: weights[name].tolist() for name in biases} == biases
        assert biases


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_in_two(tmp_path: Path) -> None:
    one = run(tmp_path, "one", *JOB[:-1], "trainer.max_steps=4")
    run(tmp_path, "run", *JOB[:-1], "trainer.max_steps=2")
    run_two(tmp_path, "model.moe.expert_parallel=1", "trainer.max_steps=4", "ckpt_path=last")
    for tag in ("train/loss", "moe/max_load"):
        assert scalars(tmp_path / "run", tag) == pytest.approx(scalars(one, tag), rel=1e-4), tag
