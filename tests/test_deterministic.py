"""`trainer.deterministic=true`: a run calls no operator that torch refuses on a GPU for want of an ordered kernel."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from callbacks.divergence.divergence import Divergence
from callbacks.divergence.flight_recorder import FlightRecorder
from callbacks.monitors.gradient_health import GradientHealth
from callbacks.monitors.signal_propagation import SignalPropagation
from callbacks.monitors.throughput import Throughput
from tests.support.fitting import Recorder, make_trainer
from tests.support.models import make_module, tokens

REFUSED = ("put", "histc", "median", "kthvalue", "nll_loss2d", "_ctc_loss", "embedding_bag", "grid_sampler", "upsample")
"""Beginnings of the names of those that torch.use_deterministic_algorithms says it refuses on CUDA, and that language
models could meet: of the others are pooling, padding and what is quantized."""
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": {"ffn": "moe", "moe": {"backend": "grouped", "expert_dim": 32, "balancing": "bias"}},
    "moe, by a loop": {"ffn": "moe", "moe": {"backend": "loop", "expert_dim": 32}},
    "siamesenorm": {"placement": "siamesenorm"},
    "attnres": {"placement": "attnres"},
    "mhc": {"placement": "mhc"},
}


class Refused(TorchDispatchMode):
    """Notes what a GPU would refuse: the names above, running sums and weighted counts of floating-point numbers.

    Attributes:
        found: names of operators.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        weighted = name == "bincount" and len(args) > 1 and args[1] is not None
        running = name.startswith("cumsum") and args[0].is_floating_point()
        by_product = name.startswith("scatter_reduce") and "prod" in args
        if weighted or running or by_product or name.startswith(REFUSED):
            self.found.add(name)
        return func(*args, **(kwargs or {}))


def batches(num: int) -> DataLoader[Any]:
    """Two documents a sequence, which are kept apart."""
    positions = torch.arange(8).remainder(5).expand(2, -1)
    return DataLoader([{"tokens": tokens(2, 9), "positions": positions} for _ in range(num)], batch_size=None)


@pytest.mark.parametrize("model", MODELS)
def test_training_validation_and_the_text_sample_call_none(model: str, tmp_path: Path) -> None:
    module = make_module({"schedule": "cosine"}, cpu_kernels="off", **MODELS[model])
    monitors: list[L.Callback] = [Throughput(), GradientHealth(), SignalPropagation(every_n_steps=2)]
    trainer = make_trainer(
        tmp_path,
        limit_val_batches=1,
        max_steps=4,
        log_every_n_steps=2,
        gradient_clip_val=1.0,
        logger=Recorder(),
        callbacks=[*monitors, FlightRecorder(str(tmp_path)), Divergence(str(tmp_path))],
        deterministic=True,
    )
    with Refused() as seen:
        try:
            trainer.fit(module, batches(4), batches(1))
            module.generate([1, 2, 3], 4, temperature=0.8, seed=0, window=8)
        finally:
            torch.use_deterministic_algorithms(False)
    assert not seen.found


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("cumsum", lambda x: x.cumsum(0)),
        ("bincount", lambda x: x.long().bincount(x)),
        ("median", lambda x: x.median(0)),
        ("histc", lambda x: x.histc(3)),
        ("put_", lambda x: x.put_(torch.tensor([0]), torch.tensor([1.0]))),
        ("scatter_reduce", lambda x: x.scatter_reduce(0, x.long(), x, "prod")),
    ],
)
def test_each_of_them_would_be_seen(name: str, call: Any) -> None:
    with Refused() as seen:
        call(torch.arange(4.0))
    assert seen.found == {name}
    with Refused() as seen:
        torch.arange(4).cumsum(0)
        torch.arange(4).bincount()
        torch.zeros(4).index_add(0, torch.arange(4), torch.ones(4))
    assert not seen.found
