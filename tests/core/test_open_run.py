"""Opening a run, however it was trained."""

from pathlib import Path

from omegaconf import OmegaConf

from core.open_run import open_run
from tests.helpers_run import run


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
