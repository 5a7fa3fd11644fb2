"""Two processes, which share out the experts or the tokens alone, against one: the same loss and gradients."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from core.errors import ConfigError
from lightning_modules.language_module import LanguageModule
from lightning_modules.sharding import shard_block, shard_rest
from lightning_modules.transformer import Transformer
from tests.support.fitting import fit
from tests.support.forked import in_processes
from tests.support.megablocks_cpu import megablocks_on_cpu
from tests.support.models import VOCAB_SIZE, make_module, tiny_values, tokens


class Case(NamedTuple):
    backend: str
    placement: str = "spannorm"
    skewed: bool = False  # all tokens go to the experts of one process
    expert_parallel: int = 2  # 1: plain data parallelism
    fsdp: bool = False  # and FSDP2 shards the rest
    checkpointing: bool = False
    compile: bool = False

    def environment(self) -> AbstractContextManager[None]:
        return megablocks_on_cpu() if self.backend == "megablocks" else nullcontext()

    def build(self) -> tuple[Transformer, Tensor]:
        """The same in every process: two sequences for each of two."""
        torch.manual_seed(0)
        moe = {
            "backend": self.backend,
            "expert_dim": 32,
            "num_shared_experts": 1,
            "expert_parallel": self.expert_parallel,
        }
        moe |= {"top_k": 1, "normalize_weights": False} if self.skewed else {}
        options: dict[str, Any] = {"placement": self.placement, "activation_checkpointing": self.checkpointing}
        options |= {"num_layers": 1} if self.compile else {}
        model, batch = make_module(ffn="moe", moe=moe, **options).model, tokens(4, 9)
        assert model is not None
        if self.skewed:
            for mixture in model.mixtures().values():
                weight = mixture.router.layer.weight.data
                weight[1], weight[2:] = -weight[0], 0.0  # one of the first two logits is positive
        return model, batch

    def share_out(self, model: Transformer, mesh: DeviceMesh) -> None:
        if self.fsdp:
            for block in model.blocks:
                shard_block(block, mesh)
            shard_rest(model, mesh)
        elif self.expert_parallel > 1:
            for mixture in model.mixtures().values():
                mixture.shard_experts(mesh["data_parallel"])


CASES = [Case(backend, skewed=skewed) for backend in ("loop", "grouped", "megablocks") for skewed in (False, True)]
CASES += [Case("loop", "subln"), Case("loop", fsdp=True), Case("loop", fsdp=True, checkpointing=True)]
CASES += [Case("loop", expert_parallel=1, **options) for options in ({}, {"fsdp": True}, {"checkpointing": True})]
CASES += [Case("loop", expert_parallel=1, skewed=True, compile=True)]


def loss_and_gradients(model: Transformer, batch: Tensor) -> dict[str, Tensor | None]:
    logits, stats = model(batch)
    # Means over tokens: equal shares add up. Weighted so that the balance would be missed in loss and gradients.
    loss = logits.square().mean() + sum(s.z_loss + s.load_balancing_loss for s in stats)
    loss.backward()
    of_second_process = torch.stack([s.tokens_per_expert[2:].sum() / s.tokens_per_expert.sum() for s in stats])
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), "of second process": of_second_process, **gradients}


def share(rank: int, folder: Path) -> None:
    """What one of the two processes does with its half of the tokens; rank 0 saves the means over both."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/rendezvous")
    mesh, results = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel")), {}
    for case in CASES:
        with case.environment():
            model, batch = case.build()
            case.share_out(model, mesh)
            if case.compile:
                model.blocks[0].compile(backend="aot_eager", fullgraph=True)
            values = loss_and_gradients(model, batch[2 * rank : 2 * rank + 2])
        for name, value in values.items():
            if isinstance(value, DTensor):
                values[name] = value.full_tensor()
            elif value is not None:
                dist.all_reduce(value)
                values[name] = value / 2
        if case.expert_parallel > 1 or case.fsdp:
            weight = model.get_parameter("blocks.0.ffn.experts.mlp.w1")
            assert isinstance(weight, DTensor)
            assert weight.to_local().numel() == weight.numel() // 2, "each process has half of the experts"
        results[case] = values
    if rank == 0:
        torch.save({tuple(case): values for case, values in results.items()}, folder / "results")
    dist.destroy_process_group()


def test_two_processes_have_the_loss_and_gradients_of_one(tmp_path: Path) -> None:
    in_processes(share, (tmp_path,))
    results = torch.load(tmp_path / "results")
    for case in CASES:
        with case.environment():
            expected = loss_and_gradients(*case.build())
        share_of_second = expected["of second process"]
        assert share_of_second is not None
        assert bool(share_of_second.any()) is not case.skewed
        torch.testing.assert_close(
            results[case], expected, atol=1e-5, rtol=1e-5, msg=lambda text, c=case: f"{c}: {text}"
        )


def test_a_strategy_that_would_average_different_experts_is_refused(tmp_path: Path) -> None:
    module = LanguageModule(tiny_values(ffn="moe", moe={"expert_parallel": 2}), {}, VOCAB_SIZE)
    with pytest.raises(ConfigError, match=r"model\.moe\.expert_parallel=2 .* trainer=fsdp"):
        fit(tmp_path, module, tokens(2, 9), max_steps=1, logger=False)
