"""The update over the parameters' norm is that of the weights before and after a step, whichever optimizer took it."""

import itertools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from callbacks.monitors.gradient_health import GradientHealth
from tests.support.fitting import Recorder, fit
from tests.support.models import make_module, tokens

NAMES = {"attn_out": "blocks.0.attn.o_proj.weight", "router": "blocks.0.ffn.router.layer.weight"}
STEPS = 3


class Weights(L.Callback):
    """Copies of some before each step."""

    def __init__(self) -> None:
        self.copies: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        parameters = dict(pl_module.model.named_parameters())
        self.copies.append({kind: parameters[name].detach().clone() for kind, name in NAMES.items()})


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion", "torch.optim.SGD"])
def test_they_are_the_differences_of_the_weights(optimizer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, weights, recorder = make_module({"optimizer": optimizer, "lr": 1e-2}, ffn="moe"), Weights(), Recorder()
    batches = [tokens(2, 9) for _ in range(STEPS)]
    callbacks = [weights, GradientHealth()]
    fit(tmp_path, module, *batches, callbacks=callbacks, logger=recorder, max_steps=STEPS)
    for kind in NAMES:
        found = recorder.series(f"updates/block_1/{kind}")
        steps = [copy[kind].double() for copy in weights.copies]
        # As logged at a step: the change of the step before, over the weights as they are now.
        expected = [float((after - before).norm() / after.norm()) for before, after in itertools.pairwise(steps)]
        assert len(found) == STEPS - 1
        assert found == pytest.approx(expected, rel=1e-4), kind
