"""Two processes that share out the experts against one that has them all: the same loss and gradients."""

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_modules.transformer import Transformer
from tests.conftest import make_module, tokens
from tests.megablocks_cpu import megablocks_on_cpu

CASES = [("loop", "spannorm"), ("grouped", "spannorm"), ("megablocks", "spannorm"), ("loop", "subln")]
"""Backend and placement; subln has a norm inside its experts."""


def model_and_tokens(backend: str, placement: str, **model: Any) -> tuple[Transformer, Tensor]:
    """The same in every process: two sequences for each of two."""
    torch.manual_seed(0)
    moe = {"backend": backend, "expert_dim": 32, "num_shared_experts": 1}
    module = make_module(ffn="moe", placement=placement, moe=moe, **model)
    assert module.model is not None
    return module.model, tokens(4, 9)


def loss_and_gradients(model: Transformer, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits, stats = model(batch)
    loss = logits.square().mean() + sum(s.z_loss for s in stats)  # means over tokens: equal shares add up
    names, parameters = zip(*model.named_parameters(), strict=True)
    return loss, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def share(rank: int, folder: Path) -> None:
    """What one of the two processes does with its half of the tokens; rank 0 saves the means over both."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/rendezvous")
    mesh, results = init_device_mesh("cpu", (2,)), {}
    for case in CASES:
        with megablocks_on_cpu() if case[0] == "megablocks" else contextlib.nullcontext():
            model, batch = model_and_tokens(*case, activation_checkpointing=case[0] == "grouped")
            for mixture in model.mixtures().values():
                mixture.shard_experts(mesh)
            loss, gradients = loss_and_gradients(model, batch[2 * rank : 2 * rank + 2])
        values = {"loss": loss.detach(), **gradients}
        for name, value in values.items():
            if isinstance(value, DTensor):
                assert value.to_local().numel() == value.numel() // 2, "each process has half of the experts"
                values[name] = value.full_tensor()
            else:
                dist.all_reduce(value)
                values[name] = value / 2
        results[case] = values
    if rank == 0:
        torch.save(results, folder / "results")
    dist.destroy_process_group()


def test_two_processes_have_the_loss_and_gradients_of_one(tmp_path: Path) -> None:
    mp.spawn(share, (tmp_path,), nprocs=2)
    results = torch.load(tmp_path / "results")
    for case in CASES:
        with megablocks_on_cpu() if case[0] == "megablocks" else contextlib.nullcontext():
            loss, gradients = loss_and_gradients(*model_and_tokens(*case))
        torch.testing.assert_close(results[case], {"loss": loss.detach(), **gradients}, atol=1e-5, rtol=1e-5)
