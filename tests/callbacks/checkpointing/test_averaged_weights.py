"""The average of the weights against the recurrence written out, and in runs too short for its decay."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from callbacks.checkpointing.averaged_weights import AveragedWeights
from core.errors import ConfigError
from tests.support.comparing import assert_equal
from tests.support.fitting import fit
from tests.support.models import make_module, tokens
from tests.support.runs import load, run, scalars

EMA = "callbacks=[default,ema]"


class Weights(L.Callback):
    """Keeps the weights after each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.seen.append({name: weight.detach().double() for name, weight in pl_module.named_parameters()})


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
@pytest.mark.parametrize(("decay", "every"), [(0.999, 1), (0.3, 1), (0.0, 1), (0.999, 3)])
def test_it_is_the_recurrence(decay: float, every: int, tmp_path: Path) -> None:
    module, weights = make_module(), Weights()
    batches = [tokens(2, 9) for _ in range(8)]
    fit(tmp_path, module, *batches, callbacks=[weights, AveragedWeights(decay, every)], logger=False, max_steps=8)
    updates = weights.seen[::every]
    for name, averaged in module.named_parameters():  # Lightning leaves the average in the module
        expected = updates[0][name]
        for n, seen in enumerate(updates[1:], start=1):
            kept = min(decay, (n + 1) / (n + 10))
            expected = kept * expected + (1 - kept) * seen[name]
        torch.testing.assert_close(averaged.detach().double(), expected, rtol=1e-5, atol=1e-7)


def test_counts_are_those_of_the_model() -> None:
    """Truth values cannot be subtracted, and whole numbers would be cut off."""
    average = AveragedWeights()._kwargs["avg_fn"]
    for value in (torch.tensor([True, False]), torch.tensor([5, 2**60 + 1])):
        assert torch.equal(average(torch.zeros_like(value), value, torch.tensor(3)), value)


def test_a_short_run_is_validated_by_weights_that_have_learned(tmp_path: Path) -> None:
    job = ["trainer.max_steps=60", "optim.lr=1e-2", "optim.schedule=constant", "optim.warmup_steps=2"]
    (last,) = scalars(run(tmp_path, "plain", *job), "val/loss").values()
    (averaged,) = scalars(run(tmp_path, "averaged", *job, EMA), "val/loss").values()
    assert last < 4.5, "5.6 at the start"
    assert averaged < last + 0.1


def test_a_resumed_average_is_that_of_the_whole_run(tmp_path: Path) -> None:
    job = [EMA, "optim.schedule=constant"]
    whole = run(tmp_path, "whole", "trainer.max_steps=6", *job)
    run(tmp_path, "run", "trainer.max_steps=3", *job)
    resumed = run(tmp_path, "run", "trainer.max_steps=6", *job, "ckpt_path=last")
    ours, theirs = (load(folder / "checkpoints/last.ckpt") for folder in (resumed, whole))
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert_equal(ours[part], theirs[part], part)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [((1.0,), "decay"), ((-0.1,), "decay"), ((0.9, 0), "update_every_n_steps"), ((0.9, 1.5), "update_every_n_steps")],
)
def test_what_is_out_of_range_is_refused(arguments: tuple[Any, ...], field: str) -> None:
    with pytest.raises(ConfigError, match=f"callbacks.ema.{field}"):
        AveragedWeights(*arguments)
