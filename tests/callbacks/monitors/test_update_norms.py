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
from tests.support.own_pieces import forget_pieces, write_pieces

NAMES = {
    "block_1/attn_out": "blocks.0.attn.o_proj.weight",
    "block_1/router": "blocks.0.ffn.router.layer.weight",
    "embedding": "embedding.weight",
    "head": "head.weight",
}
STEPS = 4
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {},
    "lion": {},
    "torch.optim.SGD": {"momentum": 0.9, "nesterov": True},
    "torch.optim.Adafactor": {},
    "my_optimizer.Signs": {"momentum": 0.7},
}


class Weights(L.Callback):
    """Copies of some before each step."""

    def __init__(self) -> None:
        self.copies: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        parameters = dict(pl_module.model.named_parameters())
        self.copies.append({kind: parameters[name].detach().clone() for kind, name in NAMES.items()})


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_they_are_the_differences_of_the_weights(
    optimizer: str, clip: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    forget_pieces()
    write_pieces(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    optim = {"optimizer": optimizer, "optimizer_options": OPTIMIZERS[optimizer], "lr": 1e-2, "warmup_steps": 2}
    module, weights, recorder = make_module(optim, ffn="moe"), Weights(), Recorder()
    batches = [tokens(2, 9) for _ in range(STEPS)]
    options = {"callbacks": [weights, GradientHealth()], "logger": recorder, "gradient_clip_val": clip}
    fit(tmp_path, module, *batches, max_steps=STEPS, **options)
    forget_pieces()
    for kind in NAMES:
        found = recorder.series(f"updates/{kind}")
        steps = [copy[kind].double() for copy in weights.copies]
        # As logged at a step: the change of the step before, over the weights as they are now.
        expected = [float((after - before).norm() / after.norm()) for before, after in itertools.pairwise(steps)]
        assert len(found) == STEPS - 1
        assert min(found) > 0
        assert found == pytest.approx(expected, rel=1e-4), kind
