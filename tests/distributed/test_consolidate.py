"""One process' run goes on in two that share the model, and what these save becomes one file again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_modules.language_module import LanguageModule
from tests.support.processes import command_line, together
from tests.support.runs import assert_began, load, run, scalars, tiny_job
from tools.consolidate import consolidate

JOB = ["experiment=moe_spannorm", "optim.schedule=constant"]


@pytest.mark.slow
def test_one_process_two_and_one_file(tmp_path: Path) -> None:
    whole = run(tmp_path, "whole", *JOB, "trainer.max_steps=4")
    run(tmp_path, "run", *JOB)
    resume = ["trainer=fsdp", "trainer.devices=2", "trainer.max_steps=4", "run_dir=run", "ckpt_path=last"]
    for (finished,) in together(2, tmp_path, command_line, [tiny_job(*JOB, *resume)]):
        assert finished.code == 0, finished.err
    assert_began(tmp_path / "run", 2)
    expected = scalars(whole, "train/loss")
    assert scalars(tmp_path / "run", "train/loss") == pytest.approx(expected, rel=1e-5)

    checkpoint, output = tmp_path / "run/checkpoints/last.ckpt", tmp_path / "weights.safetensors"
    assert len(list(checkpoint.glob("rank-*.safetensors"))) == 2, "both have written"
    consolidate(checkpoint, output)
    opened = LanguageModule.load_from_checkpoint(checkpoint).state_dict()
    weights, wanted = load_file(output), load(whole / "checkpoints/last.ckpt")["state_dict"]
    assert {f"model.{name}" for name in weights} == wanted.keys() == opened.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, opened[f"model.{name}"])
        torch.testing.assert_close(weight, wanted[f"model.{name}"], atol=1e-5, rtol=1e-4)
