"""Runs that were begun before a field existed are opened and resumed as what they were."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from core.open_run import open_run
from tests.support.runs import load, run, tiny_job, train

FORMER_DYT = "{alpha: 0.5, alpha_attention: 0.5, embedding_scale: null}"


def grow_old(folder: Path, **moe: Any) -> None:
    """Take out of the run's files what older versions did not save."""
    config = OmegaConf.load(folder / "config.yaml")
    checkpoint = load(folder / "checkpoints/last.ckpt")
    for values in (config, config.module, checkpoint["hyper_parameters"]):
        del values["model"]["norm_options"], values["model"]["init_truncation"], values["optim"]["decay_shape"]
        for name in ("optimizer", "optimizer_options", "groups"):
            del values["optim"][name]
        values["model"]["moe"].update({"normalize_weights": True, **moe})
    OmegaConf.save(config, folder / "config.yaml")
    torch.save(checkpoint, folder / "checkpoints/last.ckpt")


def resume(tmp_path: Path, *arguments: str) -> Any:
    return train(tmp_path, *tiny_job("trainer.max_steps=3", "run_dir=run", "ckpt_path=last", *arguments))


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_a_run_of_which_nothing_has_changed_goes_on_without_a_word(model: str, tmp_path: Path) -> None:
    grow_old(run(tmp_path, "run", f"model={model}"))
    open_run(tmp_path / "run")
    finished = resume(tmp_path, f"model={model}")
    assert finished.code == 0, finished.err
    assert load(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 3


def test_dyt_keeps_its_former_start(tmp_path: Path) -> None:
    folder = run(tmp_path, "run", "model.norm=dyt", f"model.norm_options={FORMER_DYT}")
    weights = load(folder / "checkpoints/last.ckpt")["state_dict"]
    grow_old(folder)
    opened = open_run(folder).module.state_dict()
    assert all(torch.equal(weight, opened[name]) for name, weight in weights.items())
    refused = resume(tmp_path, "model.norm=dyt")
    assert refused.code == 2
    assert "model.norm_options={} is not valid: expected {'alpha': 0.5, 'alpha_attention': 0.5, " in refused.err
    finished = resume(tmp_path, "model.norm=dyt", f"model.norm_options={FORMER_DYT}")
    assert finished.code == 0, finished.err


def test_the_constant_weight_of_a_single_expert_is_for_older_runs_alone(tmp_path: Path) -> None:
    single = ("model=moe", "model.moe.top_k=1")
    refused = train(tmp_path, *tiny_job("run_dir=run", *single, "model.moe.normalize_weights=true"))
    assert refused.code == 2
    assert "model.moe.normalize_weights=True is not valid: expected false or null with model.moe.top_k=1" in refused.err
    assert not (tmp_path / "run").exists()

    grow_old(run(tmp_path, "run", *single))
    assert open_run(tmp_path / "run").module.model_config.moe.normalizes_weights
    refused = resume(tmp_path, *single)
    assert refused.code == 2
    assert "model.moe.normalize_weights=False is not valid: expected True, as in the checkpoint" in refused.err
    finished = resume(tmp_path, *single, "model.moe.normalize_weights=true")
    assert finished.code == 0, finished.err
