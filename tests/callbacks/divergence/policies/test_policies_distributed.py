"""Clipping and skipping where two processes hold a part of each parameter: as one process that holds all does it."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW

from callbacks.divergence.detectors import LOSS_SPIKE, Alarm, Detectors
from callbacks.divergence.policies.adagc import AdaGC
from callbacks.divergence.policies.base import Policy, Step
from callbacks.divergence.policies.skip import Skip
from callbacks.divergence.policies.zclip import ZClip
from callbacks.divergence.step_override import StepOverride
from lightning_modules.language_module import LanguageModule
from lightning_modules.sharding import shard_block, shard_rest
from lightning_modules.transformer import Block
from tests.support.forked import in_processes
from tests.support.models import make_module

SCALES = (1.0, 1.1, 1.0, 40.0, 1.0)  # of the gradient, step by step; the fourth is to be clipped
POLICIES = {
    "zclip": lambda: ZClip(warmup_steps=3),
    "adagc": lambda: AdaGC(warmup_steps=2),
    "skip": Skip,
}


def gradients(module: LanguageModule) -> list[Tensor]:
    """The same in every process: whole, as if backward had computed them."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(p.shape, generator=generator) for p in module.parameters()]


def act(module: LanguageModule, policy: Policy) -> list[Tensor]:
    """What becomes of the gradients in each step, and of the weights in the end; all whole."""
    optimizer, detectors = AdamW(module.parameters(), lr=0.1), Detectors(7.0, 8.0, 6.0)
    base, seen = gradients(module), []
    step_override = StepOverride(optimizer)
    for number, scale in enumerate(SCALES, start=1):
        for parameter, gradient in zip(module.parameters(), base, strict=True):
            whole = scale * gradient
            parameter.grad = whole
            if isinstance(parameter, DTensor):
                parameter.grad = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        total = math.hypot(*[float((scale * gradient).norm()) for gradient in base])
        facts: Any = {"trainer": SimpleNamespace(world_size=1), "pl_module": module, "step_override": step_override}
        alarms = [Alarm(LOSS_SPIKE, 9.0, 2.0, 20.0)] if scale > 2 else []
        statistics: Any = SimpleNamespace(total_norm=total)
        before = detectors.state_dict()
        step = Step(
            **facts,
            number=number,
            loss=2.0,
            statistics=statistics,
            alarms=alarms,
            detectors=detectors,
            detectors_before=before,
        )
        optimizer.step(lambda step=step: policy.act(step) and None)  # type: ignore[misc, arg-type]
        seen += [whole_of(p.grad) for p in module.parameters() if p.grad is not None]
    return [*seen, *(whole_of(p.detach()) for p in module.parameters())]


def whole_of(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def shared(rank: int, folder: Path) -> None:
    """What one of two processes does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/rendezvous")
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    for name, make in POLICIES.items():
        plain, sharded = build(), build()
        assert sharded.model is not None
        for block in sharded.model.blocks:
            assert isinstance(block, Block)
            shard_block(block, mesh)
        shard_rest(sharded.model, mesh)
        expected, found = act(plain, make()), act(sharded, make())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
        count = len(list(plain.parameters()))
        third, fourth = (float(expected[step * count].norm()) for step in (2, 3))
        assert (fourth < 20 * third) == (name != "skip"), "40 times as large, it was clipped, or left and not used"
    dist.destroy_process_group()


def build() -> LanguageModule:
    torch.manual_seed(0)
    return make_module()


@pytest.mark.timeout(120)
def test_parts_are_treated_as_the_whole(tmp_path: Path) -> None:
    in_processes(shared, (tmp_path,))
