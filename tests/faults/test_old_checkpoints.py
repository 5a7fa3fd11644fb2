"""Checkpoints of version 0.1 go on, also those in the format of torch.distributed.checkpoint."""

import json
import shutil
from pathlib import Path

import pytest

from core.checkpoint import load
from tests.support.old_checkpoints import FIXTURES
from tests.support.processes import command_line, together
from tests.support.runs import assert_began, scalars, train

CURVE = {int(step): loss for step, loss in json.loads((FIXTURES / "curve.json").read_text()).items()}
JOB = [
    "data=synthetic",
    "data.vocab_size=32",
    "data.seq_len=31",
    "data.batch_size=4",
    "data.val_batches=1",
    "model.dim=16",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.ffn_dim=24",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "optim.warmup_steps=2",
    "optim.schedule=constant",
    "callbacks.text_sample=null",
    "callbacks.best_checkpoint=null",
    "trainer.max_steps=8",
    "run_dir=run",
    "ckpt_path=last",
]
TWO = ["trainer.devices=2"]


def assert_goes_on(folder: Path) -> None:
    assert_began(folder, 4)
    assert scalars(folder, "train/loss") == pytest.approx({step: CURVE[step] for step in range(4, 8)}, rel=1e-4)


@pytest.mark.parametrize("name", ["one_file", "in_pieces"])
def test_it_goes_on_in_one_process(tmp_path: Path, name: str) -> None:
    shutil.copytree(FIXTURES / name, tmp_path / "run")
    ended = train(tmp_path, *JOB)
    assert ended.code == 0, ended.err
    assert_goes_on(tmp_path / "run")


@pytest.mark.slow
def test_it_goes_on_in_two_that_share_the_model(tmp_path: Path) -> None:
    jobs = []
    for name, strategy in (("one_file", "fsdp"), ("in_pieces", "fsdp"), ("in_pieces", "ddp")):
        folder = f"{name}_{strategy}"
        shutil.copytree(FIXTURES / name, tmp_path / folder)
        jobs.append([*JOB, *TWO, f"trainer={strategy}", f"run_dir={folder}"])
    first, _ = together(2, tmp_path, command_line, jobs)
    for job, ended in zip(jobs, first, strict=True):
        assert ended.code == 0, ended.err
        assert_goes_on(tmp_path / job[-1].partition("=")[2])


def test_both_say_the_same(tmp_path: Path) -> None:
    """One process' weights and those of two differ by rounding alone."""
    alone, shared = (load(FIXTURES / name / "checkpoints/last.ckpt") for name in ("one_file", "in_pieces"))
    assert alone["global_step"] == shared["global_step"] == 4
    assert alone["state_dict"].keys() == shared["state_dict"].keys()
    for name, weight in alone["state_dict"].items():
        assert shared["state_dict"][name].sub(weight).abs().max() < 1e-5
    state = shared["optimizer_0"]["state"]
    assert {float(values["step"]) for values in state.values()} == {4.0}
    assert shared["optimizer_0"]["param_groups"][0]["betas"] == alone["optimizer_states"][0]["param_groups"][0]["betas"]
