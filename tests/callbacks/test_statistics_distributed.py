"""Two gloo processes, DDP or FSDP2, against one process that has all the data: the same statistics, on both ranks."""

import os
import socket
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from callbacks.monitors.gradient_health import GradientHealth
from callbacks.monitors.noise_scale import CARRIED
from callbacks.monitors.representation_collapse import RepresentationCollapse
from callbacks.monitors.signal_propagation import SignalPropagation
from callbacks.statistics import GradientStatistics, gradient_statistics
from lightning_modules.language_module import LanguageModule
from tests.support.fitting import fit
from tests.support.forked import in_processes
from tests.support.models import VOCAB_SIZE, tiny_values, tokens

STEPS = 3
CASES = [(kind, accumulate) for kind in ("ddp", "fsdp") for accumulate in (1, 2)]
STRATEGIES: dict[str, Any] = {
    "one": lambda: "auto",
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "fsdp": lambda: ModelParallelStrategy(2, 1, save_distributed_checkpoint=False, process_group_backend="gloo"),
}


class Keep(L.Callback):
    """The statistics; in the last step one entry of rank 1's gradient of a matrix's second half is made NaN before."""

    def __init__(self) -> None:
        self.statistics: list[dict[str, Any]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        gradient = pl_module.model.blocks[1].attn.o_proj.weight.grad
        if trainer.global_step == STEPS - 1 and isinstance(gradient, DTensor):
            if trainer.global_rank == 1:
                gradient.to_local()[-1, 0] = torch.nan
        elif trainer.global_step == STEPS - 1:
            gradient[-1, 0] = torch.nan
        statistics: GradientStatistics = gradient_statistics(trainer, pl_module)
        self.statistics.append({**statistics._asdict(), "groups": [tuple(group) for group in statistics.groups]})


def batches(accumulate: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [tokens(4, 9) for _ in range(STEPS * accumulate)]


def observe(root: Path, kind: str, accumulate: int, ffn: str = "dense", rank: int | None = None) -> list[Any]:
    """What every step's statistics are, with all monitors on; rank None has the whole of each batch."""
    own = [batch if rank is None else batch[2 * rank : 2 * rank + 2] for batch in batches(accumulate)]
    torch.manual_seed(0)
    module, keep = LanguageModule(tiny_values(ffn=ffn), {"warmup_steps": 0}, VOCAB_SIZE), Keep()
    monitors = [GradientHealth(), SignalPropagation(2), RepresentationCollapse(2)]
    options = {"max_steps": STEPS, "accumulate_grad_batches": accumulate, "gradient_clip_val": 0.01, "logger": False}
    options |= {"strategy": STRATEGIES[kind](), "devices": 1 if rank is None else 2, "use_distributed_sampler": False}
    fit(root, module, *own, callbacks=[keep, *monitors], **options)
    return keep.statistics


def run(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    results = {case: observe(folder, *case, rank=rank) for case in CASES}
    torch.save(results, folder / f"rank-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, int], Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    in_processes(run, (folder, port))
    return [torch.load(folder / f"rank-{rank}") for rank in (0, 1)]


def without_carried(statistics: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on whose sequences were sampled."""
    return {name: value for name, value in statistics.items() if name != "carried"}


@pytest.mark.parametrize(("kind", "accumulate"), CASES)
def test_both_ranks_have_what_one_process_has(ranks: Any, tmp_path: Path, kind: str, accumulate: int) -> None:
    expected = observe(tmp_path, "one", accumulate)
    assert expected[-1]["nonfinite_share"] > 0
    for rank in (0, 1):
        for found, wanted in zip(ranks[rank][kind, accumulate], expected, strict=True):
            for name, value in without_carried(wanted).items():
                if name == "groups":
                    assert found[name] == value
                else:
                    assert found[name] == pytest.approx(value, rel=2e-4, nan_ok=True), name
    first, second = ([without_carried(s) for s in ranks[rank][kind, accumulate][:-1]] for rank in (0, 1))
    assert first == second, "to the bit: what is decided on them must be decided alike"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_noise_scale_sees_the_gradient_of_a_part(ranks: Any, accumulate: int) -> None:
    """Of two sequences of the first batch: each process' own, averaged over both."""
    torch.manual_seed(0)
    module = LanguageModule(tiny_values(), {}, VOCAB_SIZE)
    module.configure_model()
    assert module.model is not None
    squares = []
    for part in batches(accumulate)[0].split(2):
        loss, _ = module.compute_loss({"tokens": part})
        gradients = torch.autograd.grad(loss, list(module.model.parameters()))
        squares.append(sum(gradient.double().square().sum().item() for gradient in gradients))
    for rank in (0, 1):
        (found,) = ranks[rank]["ddp", accumulate][0]["carried"][CARRIED]
        assert found == pytest.approx(sum(squares) / 2, rel=1e-4)
        assert CARRIED not in ranks[rank]["fsdp", accumulate][0]["carried"]


def test_every_rank_samples_its_own_sequences(ranks: Any) -> None:
    first, second = (ranks[rank]["ddp", 1][0]["carried"]["signal"] for rank in (0, 1))
    assert len(first) == 2 * 7
    assert first != second
    for rank, expected in enumerate((first, second)):
        assert ranks[rank]["fsdp", 1][0]["carried"]["signal"] == pytest.approx(expected, rel=1e-4)
