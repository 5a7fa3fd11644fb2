"""What the mixture costs: memory and products grow with the tokens, and not with experts x tokens."""

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lightning_modules.layers.cpu_kernels import use_cpu_kernels
from lightning_modules.layers.moe import MoE
from tests.support.moe import BACKENDS, inputs, make_moe, send_all_to


def stored(layer: MoE, x: Tensor) -> list[Tensor]:
    """What the forward pass keeps for the backward pass, each storage once, without parameters."""
    kept: dict[int, Tensor] = {}
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # holding it, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return [tensor for address, tensor in kept.items() if address not in parameters]


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_grows_with_tokens_and_not_with_experts_nor_skew(backend: str) -> None:
    def stored_bytes(num_experts: int, num_tokens: int, skewed: bool) -> int:
        layer = make_moe(num_experts=num_experts, top_k=1, backend=backend)
        if skewed:
            send_all_to(layer, num_experts - 1)
        return sum(tensor.untyped_storage().nbytes() for tensor in stored(layer, inputs(1, num_tokens)))

    few = stored_bytes(4, 64, skewed=False)
    assert stored_bytes(4, 64, skewed=True) == few, "one expert with all tokens: no padding"
    assert stored_bytes(4, 256, skewed=False) == pytest.approx(4 * few, rel=0.01)
    router = 5 * 4 * 64 * (32 - 4)  # the router's few [tokens, experts] in fp32, and nothing wider
    assert stored_bytes(32, 64, skewed=True) < few + router


@pytest.mark.parametrize(("backend", "hidden"), [("loop", 3), ("grouped", 4)])
def test_the_cpu_kernel_keeps_gate_up_and_their_product_and_not_the_activation(backend: str, hidden: int) -> None:
    """Of the loop's SwiGLU; another backend is left alone."""
    layer = make_moe(top_k=2, backend=backend)
    assert [tensor.shape for tensor in stored(layer, inputs(1, 64))].count(torch.Size([128, 24])) == 4
    use_cpu_kernels(layer)
    assert [tensor.shape for tensor in stored(layer, inputs(1, 64))].count(torch.Size([128, 24])) == hidden


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_token_is_multiplied_with_its_own_experts_alone(backend: str) -> None:
    def multiplications(num_experts: int) -> int:
        layer, x = make_moe(num_experts=num_experts, top_k=2, backend=backend), inputs(1, 64)
        # Without acc_events torch 2.11 warns.
        with profile(activities=[ProfilerActivity.CPU], acc_events=True, with_flops=True, record_shapes=True) as run:
            layer(x)[0].sum().backward()
        return sum(event.flops or 0 for event in run.events() if "mm" in event.name) // 2

    products = 3 * 3 * 64 * 2 * 32 * 24  # three matrices, forward and twice backward, tokens, top 2, their sizes
    for num_experts in (4, 32):
        router = 3 * 64 * 32 * num_experts
        assert multiplications(num_experts) == products + router


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_buffer_of_a_forced_router_grows_with_experts_times_tokens(backend: str) -> None:
    def largest(num_experts: int) -> int:
        layer, x = make_moe(num_experts=num_experts, top_k=1, backend=backend), inputs(1, 2048)
        send_all_to(layer, num_experts - 1)
        with profile(activities=[ProfilerActivity.CPU], acc_events=True, profile_memory=True) as run:
            layer(x)[0].sum().backward()
        return max(event.self_cpu_memory_usage for event in run.events())

    tokens = 4 * 2048 * 32  # in fp32: as large as the router's logits, and the weights are smaller
    assert largest(4) == largest(32) == tokens, "not even for a moment, forward or backward"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forced_router_drops_nothing(backend: str) -> None:
    layer, x, computed = make_moe(num_experts=8, top_k=1, backend=backend), inputs(2, 150), []
    send_all_to(layer, 5)
    layer.experts.mlp.register_forward_hook(lambda _, arguments, out: computed.append((*arguments, out)))
    out, _ = layer(x)
    ((rows, load, results),) = computed
    assert load.tolist() == [0, 0, 0, 0, 0, 300, 0, 0]
    assert len(rows.unique(dim=0)) == len(results.unique(dim=0)) == len(out.flatten(0, 1).unique(dim=0)) == 300
