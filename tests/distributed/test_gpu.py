"""In one process on either device: the sharded path; and on a GPU the planned memory against the measured peak."""

from pathlib import Path

import pytest
import torch

from core.checkpoint import load
from tests.support.devices import DEVICES
from tests.support.runs import run, run_on, scalars
from tools.plan import compose_config, plan

ACCELERATORS = {"cpu": "cpu", "cuda": "gpu"}


@pytest.mark.parametrize("device", DEVICES)
def test_one_process_trains_sharded_as_it_does_whole(device: str, tmp_path: Path) -> None:
    options = [f"trainer.accelerator={ACCELERATORS[device]}", "trainer.max_steps=4", "optim.schedule=constant"]
    options += ["trainer.precision=32-true", "model.compile=false"]  # which trainer=fsdp would choose for itself
    whole = run(tmp_path, "whole", *options)
    sharded = run(tmp_path, "sharded", "trainer=fsdp", "trainer.devices=1", *options)
    assert scalars(sharded, "train/loss") == pytest.approx(scalars(whole, "train/loss"), rel=1e-4)
    assert "optimizer_0" in load(sharded / "checkpoints/last.ckpt")


MODEL = ["model.num_layers=8", "model.dim=512", "model.num_heads=8", "model.ffn_dim=1376", "data=synthetic"]
MODEL += ["data.seq_len=512", "data.batch_size=16", "trainer.precision=bf16-mixed", "trainer.devices=1"]
MONITORS = ("gradient_health", "signal_propagation", "representation_collapse", "divergence", "flight_recorder")


@pytest.mark.gpu
def test_the_peak_is_as_planned(tmp_path: Path) -> None:
    planned = plan(compose_config(MODEL)).memory
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_on(tmp_path, "trainer.accelerator=gpu", *MODEL, *(f"callbacks.{name}=null" for name in MONITORS))
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(planned, rel=0.15)
