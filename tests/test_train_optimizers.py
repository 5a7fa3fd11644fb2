"""train.py with each optimizer: monitors, a resumption to the bit, and what it refuses on the command line."""

import importlib
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from core.errors import InvalidValue
from core.open_run import open_run
from tests.support.comparing import assert_equal
from tests.support.own_pieces import pieces
from tests.support.runs import load, run, scalars, tiny_job, train

STEPS, STOPPED_AT = 4, 2
GROUPS = "optim.groups={embedding: {lr_factor: 0.5, weight_decay: 0.1}, router: {lr_factor: 0.1}}"
CHOICES = {
    "muon": ["experiment=moe_spannorm", "optim=muon", "optim.optimizer_options={scale: original}", GROUPS],
    "lion": ["experiment=dense_spannorm", "optim=lion"],
    "sgd": ["experiment=dense_spannorm", "optim.optimizer=torch.optim.SGD", "optim.optimizer_options={momentum: 0.9}"],
    "own": ["experiment=dense_spannorm", "optim.optimizer=my_signs.Signs", "optim.optimizer_options={momentum: 0.7}"],
}
MONITORED = ["+callbacks=curvature", "callbacks.divergence.policy=zclip", "optim.schedule=constant"]


@pytest.mark.parametrize(
    "choice", [pytest.param(choice, marks=[] if choice in ("muon", "lion") else pytest.mark.slow) for choice in CHOICES]
)
def test_resumed_is_uninterrupted_and_monitors_hold(
    choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_signs.py").write_text(pieces()["my_optimizer.py"])
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    job = [*CHOICES[choice], *MONITORED]
    whole = run(tmp_path, "whole", *job, f"trainer.max_steps={STEPS}")
    part = run(tmp_path, "part", *job, f"trainer.max_steps={STOPPED_AT}")
    finished = train(tmp_path, *tiny_job(*job, f"trainer.max_steps={STEPS}", "run_dir=part", "ckpt_path=last"))
    assert finished.code == 0, finished.err
    ours, theirs = (load(folder / "checkpoints/last.ckpt") for folder in (part, whole))
    for name in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal(ours[name], theirs[name], name)
    for tag in ("train/loss", "optim/grad_norm", "optim/lr", "updates/block_1/attn_out", "curvature/top_eigenvalue"):
        series = scalars(whole, tag)
        assert series, tag
        found = scalars(part, tag)
        # The first step of a process has no update before it.
        assert {step: found[step] for step in found} == {step: series[step] for step in found}, tag
    sys.modules.pop("my_signs", None)


def test_a_resumed_run_keeps_its_optimizer(tmp_path: Path) -> None:
    folder = run(tmp_path, "run", "optim=muon")
    saved = OmegaConf.load(folder / "config.yaml")
    assert saved.optim.optimizer == "muon"
    more = ("trainer.max_steps=3", "run_dir=run", "ckpt_path=last")
    for arguments, said in (
        ([], "optim.optimizer='adamw' is not valid: expected 'muon', as in "),
        (["optim=muon", "optim.optimizer_options={momentum: 0.9}"], "optim.optimizer_options={'momentum': 0.9} is not"),
        (["optim=muon", "optim.groups={norm: {lr_factor: 2}}"], "optim.groups={'norm': {'lr_factor': 2}} is not valid"),
    ):
        refused = train(tmp_path, *tiny_job(*more, *arguments))
        assert refused.code == 2
        assert said in refused.err
        assert refused.err.count("\n") == 1
    assert open_run(folder).module.optim_config.optimizer == "muon"


def test_a_run_of_a_class_by_path_is_opened_with_allow_alone(tmp_path: Path) -> None:
    folder = run(tmp_path, "run", "optim.optimizer=torch.optim.SGD")
    with pytest.raises(InvalidValue, match=r"optim\.optimizer.*torch\.optim\.SGD.*allow="):
        open_run(folder)
    assert open_run(folder, allow=["torch.optim.SGD"]).module.optim_config.optimizer == "torch.optim.SGD"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["optim=muno"], "adamw, lion, muon"),
        (["optim.optimizer=muno"], "one of adamw, lion, muon (did you mean muon?), or an import path"),
        (["optim=muon", "optim.optimizer_options={scael: original}"], "optim.optimizer_options.scael='original'"),
        (["optim.optimizer=no_such_file.Mine"], "optim.optimizer='no_such_file.Mine' is not valid"),
        (["optim.groups={embeding: {lr_factor: 1}}"], "did you mean embedding?"),
    ],
)
def test_slips_on_the_command_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    refused = train(tmp_path, *tiny_job(*arguments, "run_dir=run"))
    assert refused.code == 2
    assert said in refused.err
    assert refused.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
