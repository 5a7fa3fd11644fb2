"""On a GPU in bf16: every backend computes what the loop does."""

import pytest
import torch

from lightning_modules.layers import megablocks
from lightning_modules.layers.moe import MoE
from tests.support.models import tiny_config

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["grouped", "megablocks"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_backends_agree_under_autocast(backend: str, top_k: int) -> None:
    config = tiny_config(ffn="moe", moe={"num_experts": 8, "expert_dim": 128, "top_k": top_k, "backend": "loop"})
    device = torch.device("cuda")
    if backend == "megablocks" and (obstacle := megablocks.obstacle(config, device, torch.bfloat16)):
        pytest.skip(f"megablocks {obstacle}")
    loop = MoE(config).cuda()
    moe = {"num_experts": 8, "expert_dim": 128, "top_k": top_k, "backend": backend}
    with device, torch.autocast("cuda", torch.bfloat16):
        other = MoE(tiny_config(ffn="moe", moe=moe))
    for parameter in loop.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    other.load_state_dict(loop.state_dict())

    x, results = torch.randn(2, 256, 32, device="cuda", requires_grad=True), []
    direction = torch.randn_like(x)
    for layer in (loop, other):
        with torch.autocast("cuda", torch.bfloat16):
            out, stats = layer(x)
        gradients = torch.autograd.grad((out * direction).sum(), [x, *layer.parameters()])
        results.append((stats.tokens_per_expert, out, *gradients))
    (counts, *tensors), (other_counts, *other_tensors) = results
    assert torch.equal(counts, other_counts)
    for expected, actual in zip(tensors, other_tensors, strict=True):
        assert (actual - expected).norm() / expected.norm() < 0.02  # bf16 has 8 bits


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_compiled_in_bf16_it_computes_the_same(backend: str) -> None:
    moe = {"num_experts": 8, "expert_dim": 128, "backend": backend}
    layer = MoE(tiny_config(ffn="moe", moe=moe)).cuda()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 256, 32, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        expected, actual = layer(x)[0], torch.compile(layer, fullgraph=True)(x)[0]
    assert (actual - expected).norm() / expected.norm() < 0.02
