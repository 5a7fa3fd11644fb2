"""A checkpoint that is whole, and says in one place what does not fit the run: it is refused, and nothing is left."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.sharded_checkpoint import CHECKSUM, INDEX, META, VALUES, Piece, Saved, checksum_of, read_index, write_index
from tests.support.fuzz import seeds
from tests.support.fuzz.judge import faults
from tests.support.fuzz.sandbox import Outcome, Sandbox, tree
from tests.support.runs import tiny_job

LAST, RANK = "checkpoints/last.ckpt", "rank-00000.safetensors"
Edit = Callable[[dict[str, Any]], None]


def setting(name: str, value: Any) -> Edit:
    def edit(content: dict[str, Any]) -> None:
        content["optimizer"]["param_groups"][0][name] = value

    return edit


def inside(*path: Any, value: Any) -> Edit:
    def edit(content: dict[str, Any]) -> None:
        node = content["meta"]
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value

    return edit


def of_parameter(name: str, change: Callable[[Any], Any] | None) -> Edit:
    """Change what is kept of one parameter in a checkpoint of one file; None: leave it out."""

    def edit(content: dict[str, Any]) -> None:
        state = content["optimizer"]["state"][1]
        if change is None:
            del state[name]
        else:
            state[name] = change(state[name])

    return edit


def position(content: dict[str, Any]) -> None:
    (stream,) = (part for part in content["meta"].values() if isinstance(part, dict) and "stream_identity" in part)
    stream["step"] = 1


STEPS = ("loops", "fit_loop", "epoch_loop.automatic_optimization.optim_progress", "optimizer", "step", "total")
EITHER: dict[str, tuple[Edit, str]] = {  # what is changed, and what the line names
    "the loss is driven up": (setting("maximize", True), "maximize is False"),
    "other betas": (setting("betas", (0.5, 0.5)), "betas is (0.9, 0.95)"),
    "another decay": (setting("weight_decay", 5.0), "weight_decay is 0.0"),
    "a rate that is a text": (setting("lr", "x"), "lr is 'x'"),
    "a rate of two numbers": (setting("lr", torch.zeros(2)), "lr is a Tensor, where a number"),
    "another peak": (inside("lr_schedulers", 0, "base_lrs", value=[7.0, 7.0]), "peak learning rates"),
    "one peak of two": (inside("lr_schedulers", 0, "base_lrs", value=[0.003]), "peak learning rates"),
    "another step of the schedule": (inside("lr_schedulers", 0, "last_epoch", value=700), "step of the schedule is 3"),
    "another step of the loops": (inside(*STEPS, "completed", value=7), "completed is 7"),
    "another step of the data": (position, "step is 1"),
}


ONE_FILE: dict[str, tuple[Edit, str]] = {
    "a moment that is none": (of_parameter("exp_avg", lambda _: {}), "in exp_avg, where this one has a dict"),
    "a moment that is missing": (of_parameter("exp_avg_sq", None), "in exp_avg_sq, where this one has a NoneType"),
    "another moment's shape": (
        of_parameter("exp_avg", lambda x: x[:1].clone()),
        "in exp_avg, where this one has the shape",
    ),
    "steps to come": (of_parameter("step", lambda _: torch.tensor(700.0)), "stepped 0 to 3 times; it says 700"),
    "a number of steps that is none": (of_parameter("step", lambda _: torch.tensor(float("nan"))), "it says nan"),
}


def replace(part: str, ending: str, value: Any) -> Edit:
    """Replace the first tensor of a part whose name ends so; None: leave it out."""

    def edit(content: dict[str, Any]) -> None:
        tensors = content["tensors"]
        name = next(name for name in tensors if name.startswith(part) and name.endswith(ending))
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors[name])

    return edit


def leave_out_optimizer(content: dict[str, Any]) -> None:
    del content["values"]["optimizer_0"]


def leave_out_group(content: dict[str, Any]) -> None:
    content["optimizer"]["param_groups"].pop()


PIECES: dict[str, tuple[Edit, str]] = {
    "a moment of another shape": (replace("optimizer_0", "exp_avg", lambda _: torch.zeros(1)), "has the shape [1]"),
    "a moment that is missing": (replace("optimizer_0", "exp_avg", None), "it has no optimizer_0.state."),
    "three steps": (replace("optimizer_0", ".step", lambda _: torch.zeros(3)), "has the shape [3]"),
    "a moment of integers": (replace("optimizer_0", "exp_avg", torch.Tensor.long), "is of torch.int64"),
    "a weight of another shape": (replace("state_dict", "weight", lambda _: torch.zeros(2, 2)), "has the shape [2, 2]"),
    "a weight that is missing": (replace("state_dict", "weight", None), "it has no state_dict."),
    "no optimizer": (leave_out_optimizer, "it has no optimizer_0"),
    "one group less": (leave_out_group, "other groups of parameters"),
    "a parameter that is none": (setting("params", ["nothing"]), "other groups of parameters"),
    "params that are a number": (setting("params", 5), "params is 5"),
}


QUICK = ("the loss is driven up", "another peak", "another step of the loops", "a moment that is none")


def edit_pieces(folder: Path, edit: Edit) -> None:
    """Change a checkpoint in pieces, and write the index and its checksums anew."""
    index = read_index(folder)
    values, meta = (torch.load(folder / name, weights_only=True) for name in (VALUES, META))
    tensors = load_file(folder / RANK)
    edit({"tensors": tensors, "values": values, "meta": meta, "optimizer": values["optimizer_0"]})
    torch.save(values, folder / VALUES)
    torch.save(meta, folder / META)
    save_file(tensors, folder / RANK)
    saved = {
        name: Saved(index.tensors[name].path, t.dtype, tuple(t.shape), (Piece(RANK, (0,) * t.ndim, tuple(t.shape)),))
        for name, t in tensors.items()
    }
    paths = [path for path in sorted(folder.iterdir()) if path.name not in (INDEX, CHECKSUM)]
    write_index(folder, saved, {path.name: (path.stat().st_size, checksum_of(path)) for path in paths})


def edit_file(path: Path, edit: Edit) -> None:
    content = torch.load(path, weights_only=True)
    edit({"meta": content, "optimizer": content["optimizer_states"][0]})
    torch.save(content, path)


def resume(sandbox: Sandbox, seeds_folder: Path, kind: str, edit: Edit) -> tuple[Outcome, list[str]]:
    parts = ["trainer=fsdp", "trainer.devices=1"] if kind == "pieces" else list(seeds.SNAPSHOTS)
    with sandbox.world() as world:
        run = Path(shutil.copytree(seeds_folder / kind, world.work / kind))
        (run / "lock").unlink(missing_ok=True)  # as of a run that has been copied without
        (edit_pieces if kind == "pieces" else edit_file)(run / LAST, edit)
        before = tree(world.work)
        job = tiny_job("trainer.max_steps=4", "trainer.val_check_interval=3")
        outcome = sandbox.run(world, "train.py", *job, *parts, f"run_dir={kind}", "ckpt_path=last")
        return outcome, faults(outcome, before, world)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pieces", "run"])
def test_what_is_not_changed_is_resumed(sandbox: Sandbox, seeds_folder: Path, kind: str) -> None:
    outcome, found = resume(sandbox, seeds_folder, kind, lambda content: None)
    assert (outcome.code, found) == (0, []), outcome.err


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        *(("run", what) for what in QUICK),
        *(pytest.param("run", what, marks=pytest.mark.slow) for what in {**EITHER, **ONE_FILE} if what not in QUICK),
        *(pytest.param("pieces", what, marks=pytest.mark.slow) for what in (*EITHER, *PIECES)),
    ],
)
def test_what_does_not_fit_is_refused(sandbox: Sandbox, seeds_folder: Path, kind: str, what: str) -> None:
    edit, words = {**EITHER, **(PIECES if kind == "pieces" else ONE_FILE)}[what]
    outcome, found = resume(sandbox, seeds_folder, kind, edit)
    assert outcome.code == 2, outcome.err
    assert found == []
    assert outcome.message.startswith("Error: ckpt_path=")
    assert words in outcome.message
