"""best.ckpt is the best checkpoint, whatever save_top_k keeps beside it, also where a run goes on under another one."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from tests.support.runs import load, run, scalars

UP_AND_DOWN = ["trainer.max_steps=5", "trainer.val_check_interval=1", "optim.lr=0.3", "optim.schedule=constant"]
UP_AND_DOWN += ["callbacks.divergence=null"]
"""Five validations whose losses do not fall one after another."""


def ranking(folder: Path) -> list[int]:
    """Steps, the best first."""
    losses = scalars(folder, "val/loss")
    return [step + 1 for step in sorted(losses, key=losses.__getitem__)]


def kept(folder: Path) -> dict[str, int]:
    paths = (folder / "checkpoints").glob("best*.ckpt")
    return {path.name: load(path)["global_step"] for path in paths}


@pytest.mark.parametrize("k", [1, pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(-1, marks=pytest.mark.slow)])
def test_the_best_has_the_name(k: int, tmp_path: Path) -> None:
    folder = run(tmp_path, "run", *UP_AND_DOWN, f"callbacks.best_checkpoint.save_top_k={k}")
    steps = ranking(folder)
    assert steps != sorted(steps, reverse=True), "the last one is not always the best"
    others = {f"best-step={step}.ckpt": step for step in steps[: k if k > 0 else None]} if k != 1 else {}
    assert kept(folder) == {"best.ckpt": steps[0], **others}


def test_a_name_with_fields_is_left_as_it_is(tmp_path: Path) -> None:
    options = ["callbacks.best_checkpoint.save_top_k=2", "callbacks.best_checkpoint.filename='best-{step}-mine'"]
    folder = run(tmp_path, "run", *UP_AND_DOWN, *options)
    assert kept(folder) == {f"best-step={step}-mine.ckpt": step for step in ranking(folder)[:2]}


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_a_run_that_goes_on_keeps_the_best_of_before(before: int, after: int, tmp_path: Path) -> None:
    """The first part is the better one, and nothing of the second, which is ruined, may take its place."""
    job = ["trainer.val_check_interval=1", "optim.schedule=constant", "callbacks.divergence=null"]
    first = [*job, "trainer.max_steps=3", f"callbacks.best_checkpoint.save_top_k={before}"]
    folder = run(tmp_path, "run", *first)
    best = load(folder / "checkpoints/best.ckpt")["global_step"]
    ruin = f"+callbacks.ruin._target_={__name__}.Ruin"
    run(
        tmp_path,
        "run",
        *job,
        "trainer.max_steps=6",
        f"callbacks.best_checkpoint.save_top_k={after}",
        ruin,
        "ckpt_path=last",
    )
    assert min(ranking(folder)[:1]) == best <= 3
    assert load(folder / "checkpoints/best.ckpt")["global_step"] == best


def test_a_run_that_has_moved_goes_on(tmp_path: Path) -> None:
    """Twice, and the second time its checkpoint is of a step before any validation in the new place."""
    job = ["trainer.val_check_interval=1", "callbacks.best_checkpoint.save_top_k=2", "trainer.limit_val_batches=1"]
    folder = run(tmp_path, "run", *job, "trainer.max_steps=2")
    folder.rename(tmp_path / "moved")
    job[0] = "trainer.val_check_interval=100"
    run(tmp_path, "moved", *job, "trainer.max_steps=3", "ckpt_path=last")
    (tmp_path / "moved").rename(tmp_path / "again")
    job[0] = "trainer.val_check_interval=1"
    folder = run(tmp_path, "again", *job, "trainer.max_steps=4", "ckpt_path=last")
    assert kept(folder)["best.ckpt"] == 4


class Ruin(L.Callback):
    """Each step makes the weights worse."""

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        for parameter in pl_module.parameters():
            parameter.add_(torch.randn_like(parameter))
