"""A sharded model begins with the weights of an unsharded one, and is never whole in any process while it is built."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from core.errors import ConfigError
from lightning_modules.language_module import LanguageModule
from tests.support.models import VOCAB_SIZE, make_module, tiny_values

DATA, TENSOR = 2, 2
ROWS, COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """As the last of four processes sees it: torch's fake group, whose collectives send nothing.

    Always the same one: torch caches what it knows of a mesh, and takes the meshes of two ranks for equal.
    """
    dist.init_process_group("fake", rank=DATA * TENSOR - 1, world_size=DATA * TENSOR, store=FakeStore())
    yield init_device_mesh("cpu", (DATA, TENSOR), mesh_dim_names=("data_parallel", "tensor_parallel"))
    dist.destroy_process_group()


def build(mesh: DeviceMesh, **overrides: Any) -> LanguageModule:
    torch.manual_seed(0)
    module = LanguageModule(tiny_values(**overrides), {}, VOCAB_SIZE)
    module._device_mesh = mesh
    module.configure_model()
    return module


def part(name: str, whole: Tensor) -> Tensor:
    """What that process should have: first the part of those that cut a matrix, of that its own rows."""
    if any(f"{matrix}." in name for matrix in ROWS):  # biases too
        whole = whole.chunk(TENSOR)[-1]
    elif any(f"{matrix}.weight" in name for matrix in COLUMNS):
        whole = whole.chunk(TENSOR, dim=1)[-1]
    return whole.tensor_split(-(-len(whole) // DATA) * torch.arange(1, DATA))[-1]


@pytest.mark.parametrize(
    "model",
    [
        {"placement": "siamesenorm", "num_kv_heads": 2},
        {"placement": "rezero", "norm": "dyt", "tie_embeddings": True},
        {"qk_norm": "width", "qkv_bias": True, "head_dim": 6, "vocab_size": 56},
        {"ffn": "moe", "moe": {"expert_parallel": DATA, "num_shared_experts": 1, "balancing": "bias"}},
    ],
    ids=["two streams", "gates", "biases", "moe"],
)
def test_every_process_has_its_part_of_the_unsharded_weights(mesh: DeviceMesh, model: dict[str, Any]) -> None:
    shared_out = "moe" in model
    torch.manual_seed(0)
    alone = {**model, "moe": {**model["moe"], "expert_parallel": 1}} if shared_out else model
    expected = make_module(**alone).state_dict()
    state = torch.get_rng_state()
    module = build(mesh, **model)
    assert torch.equal(torch.get_rng_state(), state)
    found = module.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        if isinstance(tensor, DTensor):
            torch.testing.assert_close(tensor.to_local(), part(name, expected[name]), atol=0, rtol=0)
        else:
            torch.testing.assert_close(tensor, expected[name], atol=0, rtol=0)


def test_no_process_ever_holds_the_whole_model(mesh: DeviceMesh) -> None:
    tracker = MemTracker()
    with tracker:
        module = build(mesh, num_layers=16, dim=64, ffn_dim=256)
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    whole = sum(p.numel() * 4 for p in module.parameters())
    assert module.model is not None
    block = sum(p.numel() * 4 for p in module.model.blocks[1].parameters())
    own = sum(p.to_local().nbytes for p in module.parameters() if isinstance(p, DTensor))
    assert 0 < peak < own + 3 * block < whole / 2


def test_what_cannot_be_cut_is_refused(mesh: DeviceMesh) -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=2 .* a divisor of model\.num_kv_heads=1"):
        build(mesh, num_kv_heads=1)
    with pytest.raises(ConfigError, match=r"model\.moe\.expert_parallel=4 .* 1 or all 2 data-parallel processes"):
        build(mesh, ffn="moe", moe={"expert_parallel": 4})
