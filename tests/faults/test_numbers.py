"""Shapes and numbers at the edge of what is allowed: every value that is logged is finite, or the run is refused."""

import math
from pathlib import Path

import pytest

from tests.support.runs import events, tiny_job, train

EDGES = {
    "learning rate 0": ["optim.lr=0"],
    "vocabulary of 2": ["data=synthetic", "data.vocab_size=2", "data.seq_len=8"],
    "sequence length 1": ["data.seq_len=1"],
    "sequence length 2": ["data.seq_len=2"],
    "one head": ["model.num_heads=1"],
    "one block": ["model.num_layers=1"],
    "one expert": ["model.moe.num_experts=1", "model.moe.top_k=1"],
    "accumulation with a remainder": [
        "trainer.accumulate_grad_batches=3",
        "trainer.val_check_interval=6",
        "trainer.max_steps=3",
    ],
}


def assert_finite_or_refused(cwd: Path, *overrides: str) -> None:
    job = tiny_job("experiment=moe_spannorm", *overrides)
    if "data=synthetic" in overrides:
        job = [argument for argument in job if not argument.startswith("data.root=")]
    finished = train(cwd, *job, "run_dir=run")
    if finished.code == 2:
        assert finished.err.startswith("Error: ")
        assert finished.err.count("\n") == 1
        return
    assert finished.code == 0, finished.err
    log = events(cwd / "run")
    assert "train/loss" in log.Tags()["scalars"]
    for tag in log.Tags()["scalars"]:
        for event in log.Scalars(tag):
            assert math.isfinite(event.value), f"{tag} at {event.step}"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("edge", EDGES)
def test_it_is_finite_or_refused(tmp_path: Path, edge: str, precision: str) -> None:
    assert_finite_or_refused(tmp_path, *EDGES[edge], f"trainer.precision={precision}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_two_hundred_and_fifty_six_blocks(tmp_path: Path, precision: str) -> None:
    assert_finite_or_refused(tmp_path, "model.num_layers=256", f"trainer.precision={precision}")
