"""Opening a run, however it was trained."""

from pathlib import Path

import torch
from omegaconf import OmegaConf

from core.checkpoint import load
from core.open_run import open_run
from tests.support.runs import run


def test_a_run_that_was_compiled_and_checkpointed_is_opened_as_neither(tmp_path: Path) -> None:
    """Its saved configuration has no references: the module has a copy of its own of the model's fields."""
    folder = run(tmp_path, "run", "experiment=dense_prenorm", "model.activation_checkpointing=true")
    config = OmegaConf.load(folder / "config.yaml")
    assert config.module.model.activation_checkpointing is True
    config.module.model.compile = True
    OmegaConf.save(config, folder / "config.yaml")
    module = open_run(folder).module
    assert not module.model_config.compile
    assert not module.model_config.activation_checkpointing
    assert all(block._compiled_call_impl is None for block in module.model.blocks)


def test_a_run_whose_backend_cannot_be_had_here_is_opened_with_one_that_can(tmp_path: Path) -> None:
    """As one trained with megablocks: it takes a GPU, and bf16 even there."""
    folder = run(tmp_path, "run", "experiment=moe_spannorm", "model.moe.backend=loop")
    config = OmegaConf.load(folder / "config.yaml")
    assert config.module.model.moe.backend == "loop"
    config.module.model.moe.backend = "megablocks"
    OmegaConf.save(config, folder / "config.yaml")
    module = open_run(folder).module
    assert {mixture.backend.name for mixture in module.model.mixtures().values()} <= {"loop", "grouped"}
    weights = load(folder / "checkpoints/last.ckpt")["state_dict"]
    assert all(torch.equal(value.cpu(), weights[name]) for name, value in module.state_dict().items())
