"""What runs differ in, of configurations as train.py composes and saves them."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_modules.composing import register_schemas
from tests.support.runs import ROOT
from tools.run_facts import differences, facts


def of_job(folder: Path, *overrides: str) -> dict[str, Any]:
    register_schemas()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", list(overrides))
    folder.mkdir(exist_ok=True)
    OmegaConf.save(config, folder / "config.yaml")
    return facts(folder)


@pytest.mark.parametrize(
    "output",
    [
        ("logger=[mlflow,csv]",),
        ("logger=[]",),
        ("profiler=torch", "trainer.enable_progress_bar=false", "blocks=all"),
        ("callbacks.text_sample=null", "callbacks.progress.line_seconds=1"),
        ("callbacks=[monitors,divergence,checkpointing]",),
    ],
)
def test_what_a_run_shows_of_its_training_is_no_difference(tmp_path: Path, output: tuple[str, ...]) -> None:
    usual = of_job(tmp_path / "a")
    other = of_job(tmp_path / "b", "optim.lr=0.125", *output)
    assert differences([usual, other]) == {"optim.lr": [usual["optim.lr"], 0.125]}
    assert len(differences([other, usual, other])) == 1


def test_what_takes_part_in_training_is_one(tmp_path: Path) -> None:
    usual = of_job(tmp_path / "a")
    for override in ("callbacks.divergence=null", "trainer.precision=bf16-mixed", "callbacks=[default,ema]"):
        found = differences([usual, of_job(tmp_path / "b", override)])
        assert found, override
        assert all(name.startswith(override[: override.index("=")]) for name in found), found
