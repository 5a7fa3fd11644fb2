"""A snapshot brings back what it took, bit for bit: on one process, and of a model that two processes share."""

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from callbacks.divergence.policies.snapshot import Snapshot
from lightning_modules.language_module import LanguageModule
from lightning_modules.sharding import shard_block, shard_rest
from lightning_modules.transformer import Block
from tests.support.forked import in_processes
from tests.support.models import make_module, tokens


def train(module: LanguageModule, optimizer: Optimizer, steps: int) -> None:
    for _ in range(steps):
        logits, _ = module(tokens(2, 9))
        logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def state(module: LanguageModule, optimizer: Optimizer) -> Any:
    both = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    return copy.deepcopy(both)


def test_what_it_took_comes_back() -> None:
    module = make_module(ffn="moe", moe={"balancing": "bias"})
    optimizer = AdamW(module.parameters(), lr=0.1, fused=True)
    train(module, optimizer, 2)
    snapshot, before = Snapshot(2, module, optimizer, {}, {}), state(module, optimizer)
    weight = module.model.head.weight  # type: ignore[union-attr]
    train(module, optimizer, 3)
    after = state(module, optimizer)
    optimizer.param_groups[0]["lr"] = 0.05
    snapshot.restore(module, optimizer, {})
    assert module.model.head.weight is weight, "in place"  # type: ignore[union-attr]
    assert optimizer.param_groups[0]["lr"] == 0.05, "learning rates go by the clock"
    optimizer.param_groups[0]["lr"] = 0.1
    torch.testing.assert_close(state(module, optimizer), before, rtol=0, atol=0)
    train(module, optimizer, 3)
    torch.testing.assert_close(state(module, optimizer), after, rtol=0, atol=0)


def test_averages_of_the_weights_come_back_in_place() -> None:
    module = make_module()
    optimizer = AdamW(module.parameters(), lr=0.1)
    average = AveragedModel(module, use_buffers=True)
    average.update_parameters(module)
    before = copy.deepcopy(average.state_dict())
    snapshot = Snapshot(1, module, optimizer, {}, average.state_dict())
    train(module, optimizer, 2)
    average.update_parameters(module)
    assert not torch.equal(average.state_dict()["module.model.head.weight"], before["module.model.head.weight"])
    snapshot.restore(module, optimizer, average.state_dict())
    torch.testing.assert_close(average.state_dict(), before, rtol=0, atol=0)


def test_of_an_optimizer_that_had_not_stepped() -> None:
    module = make_module()
    optimizer = AdamW(module.parameters(), lr=0.1)
    snapshot, before = Snapshot(0, module, optimizer, {}, {}), state(module, optimizer)
    train(module, optimizer, 1)
    snapshot.restore(module, optimizer, {})
    torch.testing.assert_close(state(module, optimizer), before, rtol=0, atol=0)


def shared(rank: int, folder: Path) -> None:
    """What one of two processes does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/rendezvous")
    torch.manual_seed(0)
    module = make_module()
    assert module.model is not None
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    for block in module.model.blocks:
        assert isinstance(block, Block)
        shard_block(block, mesh)
    shard_rest(module.model, mesh)
    optimizer = AdamW(module.parameters(), lr=0.1)
    train(module, optimizer, 2)
    snapshot, before = Snapshot(2, module, optimizer, {}, {}), weights(module)
    train(module, optimizer, 2)
    after = weights(module)
    assert not torch.equal(before, after)
    snapshot.restore(module, optimizer, {})
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
    assert torch.equal(weights(module), before)
    train(module, optimizer, 2)
    assert torch.equal(weights(module), after), "moments and random numbers came back too"
    dist.destroy_process_group()


def weights(module: LanguageModule) -> torch.Tensor:
    """All of them, whole."""
    return torch.cat([parameter.full_tensor().detach().flatten() for parameter in module.parameters()])  # type: ignore[attr-defined]


def test_of_a_model_that_two_processes_share(tmp_path: Path) -> None:
    in_processes(shared, (tmp_path,))
