"""What callbacks keep in a checkpoint is looked at before a run is resumed from it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.checkpointing.best_checkpoint import BestCheckpoint
from callbacks.checkpointing.random_state import RandomState
from callbacks.divergence.divergence import Divergence
from callbacks.monitors.throughput import Throughput
from core.checkpoint_values import checked
from core.untrusted import Untrusted


def states(policy: str = "rollback") -> dict[str, Any]:
    divergence = Divergence("run", policy)
    for loss in (3.0, 2.9, 2.8):
        divergence.detectors.update(loss, 1.0)
    return {
        "RandomState": RandomState().state_dict(),
        "Divergence": divergence.state_dict(),
        "Throughput": {"tokens": 4096},
    }


@pytest.mark.parametrize("policy", ["warn", "skip", "zclip", "rollback", "stop"])
def test_what_this_project_saves_is_taken(policy: str) -> None:
    saved = states(policy)
    assert checked({"callbacks": saved})["callbacks"] is saved
    assert Throughput.__qualname__ in saved


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Set what lies at a path, the last of the arguments being the value."""

    def change(node: Any) -> None:
        *way, key, value = path
        for name in way:
            node = node[name]
        node[key] = value

    return change


ODD = {
    "no group": put("RandomState", "x"),
    "no list": put("RandomState", "parts", "x"),
    "no processes": put("RandomState", "parts", ["x"]),
    "no tensor": put("RandomState", "parts", 0, "cpu", "x"),
    "another type": put("RandomState", "parts", 0, "cpu", torch.zeros(5056)),
    "another length": put("RandomState", "parts", 0, "cpu", torch.zeros(3, dtype=torch.uint8)),
    "another content": put("RandomState", "parts", 0, "cpu", torch.full((5056,), 255, dtype=torch.uint8)),
    "text in a history": put("Divergence", "detectors", "loss", "values", ["x"]),
    "text as a history": put("Divergence", "detectors", "loss", "values", "abc"),
    "a number as a history": put("Divergence", "detectors", "climb", "values", 5),
    "text of groups": put("Divergence", "groups", "usual", "x"),
    "text of a policy": put("Divergence", "policy", "rollback", "due", "x"),
    "text as tokens": put("Throughput", "tokens", "x"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_states_are_refused_by_name(name: str) -> None:
    saved = states()
    ODD[name](saved)
    with pytest.raises(Untrusted, match=r"its callbacks\.(RandomState|Divergence|Throughput)"):
        checked({"callbacks": saved})


@pytest.mark.parametrize(
    ("name", "value"), [("schedule_steps", "x"), ("run_summary", 5), ("run_summary", {"val_loss": "x"})]
)
def test_what_is_used_where_training_begins_or_ends_is_looked_at_before(name: str, value: Any) -> None:
    with pytest.raises(Untrusted, match=f"its {name}"):
        checked({name: value})
    good = {"schedule_steps": math.inf, "run_summary": {"val_loss": 1.5, "tokens": None}}
    assert checked(good) is good


def training() -> dict[str, Any]:
    """What a checkpoint has of the optimizer, its schedule and the position in the data."""
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    weight.grad = torch.ones(2)
    optimizer.step()
    schedule.step()
    return {
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [schedule.state_dict()],
        "Synthetic": {"samples": 16, "step": 4, "stream_identity": {"seed": 0}},
    }


@pytest.mark.parametrize(
    "path",
    [
        ("optimizer_states",),
        ("optimizer_states", 0),
        ("optimizer_states", 0, "param_groups"),
        ("optimizer_states", 0, "param_groups", 0),
        ("optimizer_states", 0, "param_groups", 0, "lr"),
        ("optimizer_states", 0, "param_groups", 0, "betas"),
        ("lr_schedulers",),
        ("lr_schedulers", 0),
        ("lr_schedulers", 0, "step"),
        ("lr_schedulers", 0, "optimizer"),
        ("lr_schedulers", 0, "last_epoch"),
        ("lr_schedulers", 0, "_last_lr"),
        ("Synthetic", "samples"),
        ("Synthetic", "step"),
    ],
    ids=str,
)
def test_what_training_goes_on_with_is_looked_at_before(path: tuple[Any, ...]) -> None:
    """torch and Lightning take any of it, and fail steps later: a schedule's state even replaces its methods."""
    saved = training()
    assert checked(saved) is saved
    put(*path, "x")(saved)
    with pytest.raises(Untrusted, match=f"its {path[0]}"):
        checked(saved)


class Mine(ModelCheckpoint):
    """The user's own, whose state goes by its own name."""


KINDS = [BestCheckpoint, ModelCheckpoint, Mine]
PLACES = ["best_k_models", "best_model_path", "kth_best_model_path", "last_model_path"]
WAYS_OUT = {
    "upwards": "{folder}/../mine",
    "elsewhere": "{folder}-of-mine/x.ckpt",
    "relative": "mine/x.ckpt",
    "the folder": "{folder}",
    "of this machine": "local:///mine",
    "of this machine, below": "local://{folder}/x.ckpt",
    "a file": "file:///mine",
    "a bucket": "s3://bucket/mine",
    "in a chain": "{folder}/x.ckpt::local:///mine",
    "no text": 5,
}


def kept(kind: type[ModelCheckpoint], folder: Path) -> tuple[ModelCheckpoint, dict[str, Any]]:
    """A callback, and the state of one that has saved two."""
    callback = kind(dirpath=folder, monitor="val/loss", save_top_k=2)
    first, second = (str(folder / f"best-step={step}.ckpt") for step in (1, 2))
    paths = {"best_model_path": first, "kth_best_model_path": second, "best_k_models": {first: 1.0, second: 2.0}}
    return callback, {**callback.state_dict(), **paths}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", WAYS_OUT)
@pytest.mark.parametrize("names_it", [True, False])
def test_no_callback_is_led_out_of_its_folder(
    kind: type[ModelCheckpoint], place: str, way: str, names_it: bool, tmp_path: Path
) -> None:
    """Lightning deletes what is no longer among the best by fsspec, which takes it for a place on any file system."""
    callback, state = kept(kind, tmp_path)
    if not names_it:
        del state["dirpath"]  # then the callback takes all of the state for its own
    checked({"callbacks": {callback.state_key: state}}, tmp_path)
    path = WAYS_OUT[way]
    path = path.format(folder=tmp_path) if isinstance(path, str) else path
    state[place] = {**state[place], path: 1.0} if place == "best_k_models" else path
    with pytest.raises(Untrusted, match=f"{place} is .*, where (the path of a checkpoint, without|a path below)"):
        checked({"callbacks": {callback.state_key: state}}, tmp_path)


@pytest.mark.parametrize("path", ["local:///mine", "/mine/..", "a::b", 5])
def test_the_folder_itself_is_a_plain_path(path: Any) -> None:
    with pytest.raises(Untrusted, match=r"dirpath is .*, where the path of a checkpoint, without"):
        checked({"callbacks": {"ModelCheckpoint{}": {"dirpath": path}}})


@pytest.mark.parametrize("folder", ["logs/checkpoints", ""])
def test_relative_paths_are_below_a_relative_folder(folder: str) -> None:
    """As Lightning makes them of a logger's relative folder."""
    path = str(Path(folder) / "epoch=0.ckpt")
    state = {"dirpath": folder, "best_k_models": {path: 1.0}, "best_model_path": path, "last_model_path": ""}
    checked({"callbacks": {"ModelCheckpoint{}": state}}, Path("run/checkpoints"))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_saves_that_has_moved_is_taken(kind: type[ModelCheckpoint], tmp_path: Path) -> None:
    """Lightning takes over the old place of the best checkpoint, and saves it again before there is a new one."""
    callback, state = kept(kind, tmp_path / "old")
    for place in ("new", "newer"):
        checked({"callbacks": {callback.state_key: state}}, tmp_path / place)
        callback = kind(dirpath=tmp_path / place, monitor="val/loss", save_top_k=2)
        callback.load_state_dict(state)
        state = callback.state_dict()
        assert state["best_k_models"] == {}
    if kind is BestCheckpoint:
        assert state["best_model_path"] == "", "what lies elsewhere is given no second name in this run"


def test_an_integer_that_python_does_not_write_out_is_refused() -> None:
    with pytest.raises(Untrusted, match="vocab_size is a int"):
        checked({"hyper_parameters": {"vocab_size": 10**5000}})
