"""configs/callbacks: a file for each of the groups, which are chosen one by one, in lists, or all together."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.composing import composed
from tests.support.runs import ROOT, load, scalars, tiny_job, train

GROUPS = ("monitors", "divergence", "checkpointing", "console")
DEFAULT = [
    "progress",
    "throughput",
    "gradient_health",
    "signal_propagation",
    "representation_collapse",
    "stream_mixing",
    "source_weights",
    "gate_means",
    "slow_steps",
    "trouble",
    "dashboard",
    "depth_pictures",
    "hyperparameters",
    "random_state",
    "text_sample",
    "run_summary",
    "run_status",
    "best_checkpoint",
    "last_checkpoint",
    "flight_recorder",
    "divergence",
]


def group(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / f"configs/callbacks/{name}.yaml").read_text())
    return found


def test_the_default_is_all_groups_in_the_order_of_always() -> None:
    callbacks = composed().callbacks
    assert list(callbacks) == DEFAULT
    files = {name: node for file in map(group, GROUPS) for name, node in file.items()}
    assert files.keys() == set(DEFAULT)
    for name, node in files.items():
        assert list(callbacks[name]) == list(node), name
        assert callbacks[name]["_target_"] == node["_target_"]


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_holds_the_callbacks_of_its_package(name: str) -> None:
    for node in group(name).values():
        assert node["_target_"].startswith(f"callbacks.{name}.")


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (["callbacks=monitors"], [*group("monitors")]),
        (["callbacks=[monitors,divergence]"], [*group("monitors"), *group("divergence")]),
        (["callbacks=[default,curvature]"], [*DEFAULT, "curvature"]),
        (["+callbacks=curvature"], [*DEFAULT, "curvature"]),
        (["callbacks=[default,early_stopping,ema]"], [*DEFAULT, "early_stopping", "ema"]),
        (["callbacks={}"], DEFAULT),
    ],
    ids=lambda value: " ".join(value) if value and "callbacks" in value[0] else "",
)
def test_groups_are_chosen(chosen: list[str], expected: list[str]) -> None:
    assert list(composed(*chosen).callbacks) == expected


def test_a_run_has_the_callbacks_that_were_chosen(tmp_path: Path) -> None:
    """Of an experiment that sets fields of others, too."""
    job = [override for override in tiny_job("run_dir=run") if override != "callbacks.text_sample=null"]
    chosen = ["study_scale=laptop", "callbacks=[monitors,divergence]", "+callbacks=curvature"]
    finished = train(tmp_path, *chosen, *job, "trainer.val_check_interval=2")
    assert finished.code == 0, finished.err
    assert list(scalars(tmp_path / "run", "curvature/top_eigenvalue")) == [0]
    assert scalars(tmp_path / "run", "gradients/block_1/all")
    assert not (tmp_path / "run/summary.json").exists()
    assert not (tmp_path / "run/checkpoints/last.ckpt").exists()


def test_a_run_that_stops_early_validates_and_saves_averaged_weights(tmp_path: Path) -> None:
    chosen = [
        "callbacks=[default,early_stopping,ema]",
        "callbacks.ema.decay=0.5",
        "callbacks.early_stopping.patience=1",
    ]
    job = [
        "callbacks.early_stopping.min_delta=100",
        "trainer.max_steps=20",
        "trainer.val_check_interval=2",
        "run_dir=run",
    ]
    finished = train(tmp_path, *tiny_job(*chosen, *job))
    assert "Ended early, after step 4 of 20: EarlyStopping" in finished.out
    saved = load(tmp_path / "run/checkpoints/last.ckpt")
    trained, averaged = saved["current_model_state"], saved["state_dict"]
    assert trained.keys() == averaged.keys()
    assert not all(torch.equal(trained[name], averaged[name]) for name in trained)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            ["callbacks=[monitor]"],
            "expected one of anatomy, checkpointing, console, curvature, default, divergence, early_stopping, "
            "ema, monitors",
        ),
        (["+callbacks=[console,curvatur]"], "(did you mean curvature?)"),
        (["-m", "callbacks=monitors,console", "+callbacks=curvature"], "whole lists where callbacks is swept"),
        (["+callbacks.mine={a: 1}"], "callbacks.mine={'a': 1} is not valid: expected a group with a _target_"),
    ],
)
def test_what_is_no_choice_is_said_in_a_line(chosen: list[str], message: str, tmp_path: Path) -> None:
    refused = train(tmp_path, *tiny_job("run_dir=run", *chosen))
    assert refused.code == 2
    assert message in refused.err
    assert len(refused.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()
