"""Where a run lives and how it is resumed; tests/test_train.py tries it on real runs."""

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from core.errors import ConfigError
from core.run_folder import NAME_LENGTH, RunFolder, folder_name, locate, resume_command


def asked(**values: Any) -> DictConfig:
    return OmegaConf.create({"run_dir": None, "ckpt_path": None, **values})


@pytest.fixture(autouse=True)
def _cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_new_run_goes_below_its_experiment() -> None:
    assert locate(asked(), "moe", "now") == RunFolder(Path("runs/moe/now"), None)
    assert locate(asked(), None, "now") == RunFolder(Path("runs/default/now"), None)
    assert locate(asked(run_dir=5), "moe", "now").path == Path("5")
    Path("runs/moe/now").mkdir(parents=True)
    assert locate(asked(), "moe", "now").path == Path("runs/moe/now-2")
    assert not Path("runs/default").exists(), "deciding creates nothing"


def test_a_checkpoint_from_elsewhere_starts_a_new_folder_and_one_of_a_run_goes_on_there() -> None:
    for folder in (Path("somewhere/checkpoints"), Path("run/checkpoints")):
        folder.mkdir(parents=True)
        torch.save({}, folder / "x.ckpt")
    Path("run/config.yaml").touch()
    path = "somewhere/checkpoints/x.ckpt"
    assert locate(asked(ckpt_path=path), "moe", "now") == RunFolder(Path("runs/moe/now"), Path(path))
    path = "run/checkpoints/x.ckpt"
    assert locate(asked(ckpt_path=path), "moe", "now") == RunFolder(Path("run").absolute(), Path(path))
    assert locate(asked(ckpt_path=path, run_dir="other"), "moe", "now").path == Path("other")


@pytest.mark.parametrize(("values", "field"), [({"ckpt_path": "last"}, "ckpt_path"), ({"ckpt_path": "."}, "ckpt_path")])
def test_what_is_not_there_is_refused(values: dict[str, str], field: str) -> None:
    with pytest.raises(ConfigError) as error:
        locate(asked(**values), "moe", "now")
    assert error.value.field == field


def test_the_command_repeats_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some where/train.py"])
    overrides = ["experiment=moe", "+callbacks.mine={a: 1}", "trainer.max_steps=7", "run_dir=old", "ckpt_path=x.ckpt"]
    run = RunFolder(Path("runs/moe/a run").absolute(), None)
    run.create(asked(seed=1), overrides)
    run.create(asked(seed=2), ["seed=2"])
    assert OmegaConf.load(run.path / "config.yaml").seed == 1
    command = ["python", "/some where/train.py", *overrides[:2]]
    end = ["run_dir='runs/moe/a run'", "ckpt_path=last"]
    assert shlex.split(resume_command(run.path)) == [*command, "trainer.max_steps=7", *end]
    assert shlex.split(resume_command(run.path, max_steps=14)) == [*command, "trainer.max_steps=14", *end]


@pytest.mark.parametrize("name", ["lr=1,b", "a run (a)", "it's", "a\\b", "2026-11-24_05-42-00", "5"])
def test_any_folder_can_be_resumed_by_the_command(name: str) -> None:
    run = RunFolder(Path(name), None)
    run.create(asked(), [])
    (override, _) = OverridesParser.create().parse_overrides(shlex.split(resume_command(run.path))[2:])
    assert override.key_or_group == "run_dir"
    assert str(override.value()) == name


def test_the_command_names_the_interpreter_of_the_environment_here(monkeypatch: pytest.MonkeyPatch) -> None:
    RunFolder(Path("run"), None).create(asked(), [])
    monkeypatch.setattr(sys, "executable", str(Path(".venv/bin/python").absolute()))
    assert shlex.split(resume_command(Path("run")))[0] == ".venv/bin/python"
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    assert shlex.split(resume_command(Path("run")))[0] == "python"


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "now"),
        (["experiment=moe", "run_dir=x", "ckpt_path=last"], "now"),
        (["model.placement=postnorm", "optim.lr=1e-3"], "now_placement-postnorm_lr-1e-3"),
        (["+callbacks.mine={a: 1}", "~logger", "data.path='my texts/ü'"], "now_mine-a-1_logger_path-my-texts"),
        (["model.init=scale_init", "/x/y@z=$(rm -rf ~)"], "now_init-scale-init_y-z-rm-rf"),
        (["a.long=" + 100 * "x", "seed=1"], "now_seed-1"),
    ],
)
def test_a_folder_is_named_after_what_was_asked_for(overrides: list[str], name: str) -> None:
    assert folder_name("now", overrides) == name


def test_names_are_bounded() -> None:
    assert 60 < len(folder_name("now", [f"field={n}" for n in range(1000)])) <= NAME_LENGTH
