"""What the mixture costs: memory and products grow with the tokens, and not with experts x tokens."""

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lightning_modules.layers.moe import MoE
from tests.lightning_modules.layers.test_moe import BACKENDS, inputs, make_moe, send_all_to


def stored_bytes(layer: MoE, x: Tensor) -> int:
    """What the forward pass keeps for the backward pass, each storage once, without parameters."""
    kept: dict[int, Tensor] = {}
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # holding it, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_grows_with_tokens_and_not_with_experts_nor_skew(backend: str) -> None:
    def stored(num_experts: int, num_tokens: int, skewed: bool) -> int:
        layer = make_moe(num_experts=num_experts, top_k=1, backend=backend)
        if skewed:
            send_all_to(layer, num_experts - 1)
        return stored_bytes(layer, inputs(1, num_tokens))

    few = stored(4, 64, skewed=False)
    assert stored(4, 64, skewed=True) == few, "one expert with all tokens: no padding"
    assert stored(4, 256, skewed=False) == pytest.approx(4 * few, rel=0.01)
    router = 5 * 4 * 64 * (32 - 4)  # the router's few [tokens, experts] in fp32, and nothing wider
    assert stored(32, 64, skewed=True) < few + router


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_token_is_multiplied_with_its_own_experts_alone(backend: str) -> None:
    def multiplications(num_experts: int) -> int:
        layer, x = make_moe(num_experts=num_experts, top_k=2, backend=backend), inputs(1, 64)
        with profile(activities=[ProfilerActivity.CPU], with_flops=True, record_shapes=True) as run:
            layer(x)[0].sum().backward()
        return sum(event.flops or 0 for event in run.events() if "mm" in event.name) // 2

    products = 3 * 3 * 64 * 2 * 32 * 24  # three matrices, forward and twice backward, tokens, top 2, their sizes
    for num_experts in (4, 32):
        router = 3 * 64 * 32 * num_experts
        assert multiplications(num_experts) == products + router
