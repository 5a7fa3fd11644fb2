"""train.py with trainer=fsdp and experts shared out: two processes train, save and resume as one process does."""

from pathlib import Path

import pytest

from core.checkpoint import load
from tests.support.processes import command_line, together
from tests.support.runs import run, scalars, tiny_job

JOB = ["experiment=moe_spannorm", "model.moe.balancing=bias", "optim.schedule=constant"]
TWO = ["trainer=fsdp", "trainer.devices=2"]
CHECKPOINT = "checkpoints/last.ckpt"


def run_two(cwd: Path, *jobs: list[str]) -> None:
    """Two processes, one job after the other."""
    for finished in together(2, cwd, command_line, [tiny_job(*TWO, *JOB, *job) for job in jobs])[0]:
        assert finished.code == 0, finished.err


def test_two_processes_train_save_and_resume_as_one(tmp_path: Path) -> None:
    whole = run(tmp_path, "whole", *JOB, "trainer.max_steps=4")
    shared_out = "model.moe.expert_parallel=2"
    resume = ["trainer.max_steps=4", f"ckpt_path=first/{CHECKPOINT}"]
    run_two(tmp_path, [shared_out, "run_dir=first"], [shared_out, *resume, "run_dir=second"])
    assert (tmp_path / "first" / CHECKPOINT).is_dir()
    alone = run(tmp_path, "alone", *JOB, *resume)
    expected = load(whole / CHECKPOINT)["state_dict"]
    for folder, first in ((tmp_path / "first", 0), (tmp_path / "second", 2), (alone, 2)):
        for tag in ("train/loss", "moe/max_load", "optim/grad_norm"):
            found, wanted = scalars(folder, tag), scalars(whole, tag)
            assert min(found) == first
            assert found == pytest.approx({step: wanted[step] for step in range(first, first + 2)}, rel=1e-4), tag
    for folder in (tmp_path / "second", alone):
        weights = load(folder / CHECKPOINT)["state_dict"]
        biases = {name: bias.tolist() for name, bias in expected.items() if name.endswith("expert_bias")}
        assert {name: weights[name].tolist() for name in biases} == biases
        assert biases
        assert weights.keys() == expected.keys()


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_in_two(tmp_path: Path) -> None:
    one = run(tmp_path, "one", *JOB, "trainer.max_steps=4")
    run(tmp_path, "run", *JOB, "trainer.max_steps=2")
    run_two(tmp_path, ["trainer.max_steps=4", "run_dir=run", "ckpt_path=last"])
    for tag in ("train/loss", "moe/max_load"):
        assert scalars(tmp_path / "run", tag) == pytest.approx(scalars(one, tag), rel=1e-4), tag
