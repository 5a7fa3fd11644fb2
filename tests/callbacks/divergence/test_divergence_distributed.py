"""Two gloo processes of which one is in trouble: they decide alike, and as one process does that has all the data."""

import datetime
import json
import math
import os
import socket
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from callbacks.divergence.divergence import Divergence
from lightning_modules.language_module import LanguageModule
from tests.support.fitting import fit
from tests.support.forked import in_processes
from tests.support.models import VOCAB_SIZE, tiny_values, tokens
from tests.support.sabotage import NaNGradient

SPIKE, NAN_LOSS, NAN_GRADIENT, STEPS = 12, 13, 14, 15


class BadLoss(L.Callback):
    """On the last rank the loss that the monitors see spikes or is no number; its gradient stays what it is."""

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        rise = {SPIKE: 10.0 * trainer.world_size, NAN_LOSS: torch.nan}.get(trainer.global_step + 1, 0.0)
        if trainer.global_rank == trainer.world_size - 1:
            loss.detach().add_(rise)


class KeepWeights(L.Callback):
    """All weights after each step."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.weights.append(torch.cat([p.detach().flatten() for p in pl_module.parameters()]))


def train(folder: Path, rank: int | None = None) -> list[Tensor]:
    """The weights after each step of a run that skips; rank None has the whole of each batch."""
    torch.manual_seed(1)
    batches = [tokens(4, 9) for _ in range(STEPS)]
    own = [batch if rank is None else batch[2 * rank : 2 * rank + 2] for batch in batches]
    torch.manual_seed(0)
    module, keep = LanguageModule(tiny_values(ffn="dense"), {"warmup_steps": 0}, VOCAB_SIZE), KeepWeights()
    callbacks = [BadLoss(), NaNGradient(NAN_GRADIENT), Divergence(str(folder), policy="skip"), keep]
    # A process that waits for the other in vain fails, and ends both.
    two = DDPStrategy(process_group_backend="gloo", timeout=datetime.timedelta(seconds=60))
    options = {"max_steps": STEPS, "logger": False, "use_distributed_sampler": False}
    options |= {"strategy": "auto" if rank is None else two, "devices": 1 if rank is None else 2}
    fit(folder, module, *own, callbacks=callbacks, **options)
    return keep.weights


def run(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.save(train(folder, rank), folder / f"rank-{rank}")
    dist.destroy_process_group()


def events(folder: Path) -> dict[int, dict[str, Any]]:
    """By step."""
    found = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return {event["step"]: event for event in found}


def figures(event: dict[str, Any]) -> list[float]:
    """Taken out of the event: what depends on the order of additions. The file has null for what is no number."""
    values = [event.pop(name) for name in ("score", "loss", "grad_norm")]
    return [math.nan if value is None else value for value in values]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    in_processes(run, (folder, port))
    return folder


def test_trouble_on_one_rank_stops_the_update_on_both(two: Path) -> None:
    first, second = (torch.load(two / f"rank-{rank}") for rank in (0, 1))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    moved = [step for step in range(2, STEPS + 1) if not torch.equal(first[step - 1], first[step - 2])]
    assert moved == [step for step in range(2, STEPS + 1) if step not in (SPIKE, NAN_LOSS, NAN_GRADIENT)]


def test_the_events_are_those_of_one_process(two: Path, tmp_path: Path) -> None:
    train(tmp_path)
    ours, alone = events(two), events(tmp_path)
    kinds = {SPIKE: ["loss spike"], NAN_LOSS: ["non-finite loss"], NAN_GRADIENT: ["non-finite gradient"]}
    assert {step: event["alarms"] for step, event in alone.items()} == kinds
    assert alone[NAN_GRADIENT]["finding"].endswith("% not finite")
    assert ours.keys() == alone.keys()
    for step, event in alone.items():
        assert figures(ours[step]) == pytest.approx(figures(event), rel=1e-4, nan_ok=True)
        assert ours[step] == event, "samples, block, kind of parameter, finding, and what was done"
