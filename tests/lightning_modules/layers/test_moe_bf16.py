"""In bf16, on either device: every backend computes what the loop does, compiled or not."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.layers import megablocks
from lightning_modules.layers.moe import MoE
from tests.support.devices import DEVICES
from tests.support.models import tiny_config

CLOSE = 0.02
"""bf16 has 8 bits."""


def make_layer(device: str, backend: str, top_k: int = 2) -> MoE:
    moe = {"num_experts": 8, "expert_dim": 128, "top_k": top_k, "backend": backend}
    with torch.device(device), torch.autocast(device, torch.bfloat16):
        layer = MoE(tiny_config(ffn="moe", moe=moe))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return layer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["grouped", "megablocks"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_backends_agree_under_autocast(backend: str, top_k: int, device: str) -> None:
    config = tiny_config(ffn="moe", moe={"num_experts": 8, "expert_dim": 128})
    if backend == "megablocks" and (found := megablocks.obstacle(config, torch.device(device), torch.bfloat16)):
        pytest.skip(f"megablocks {found}")
    loop, other = (make_layer(device, name, top_k) for name in ("loop", backend))
    other.load_state_dict(loop.state_dict())

    x, results = torch.randn(2, 256, 32, device=device, requires_grad=True), []
    direction = torch.randn_like(x)
    for layer in (loop, other):
        with torch.autocast(device, torch.bfloat16):
            out, stats = layer(x)
        gradients = torch.autograd.grad((out * direction).sum(), [x, *layer.parameters()])
        results.append((stats.tokens_per_expert, out, *gradients))
    (counts, *tensors), (other_counts, *other_tensors) = results
    assert torch.equal(counts, other_counts)
    for expected, actual in zip(tensors, other_tensors, strict=True):
        assert (actual - expected).norm() / expected.norm() < CLOSE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_compiled_in_bf16_it_computes_the_same(backend: str, device: str) -> None:
    layer = make_layer(device, backend)
    x = torch.randn(2, 256, 32, device=device)
    compiler = "inductor" if device == "cuda" else "aot_eager"
    with torch.autocast(device, torch.bfloat16):
        expected, actual = layer(x)[0], torch.compile(layer, fullgraph=True, backend=compiler)(x)[0]
    assert (actual - expected).norm() / expected.norm() < CLOSE


def test_every_row_of_grouped_products_is_an_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """F.grouped_mm leaves others as the memory was (pytorch/pytorch, issue 193633: NaN on a B300)."""
    plain, left = F.grouped_mm, []

    def note(a: Any, b: Any, *, offs: Any) -> Any:
        left.append((a.size(0) if b.dim() == 3 else a.size(1)) - int(offs[-1]))
        return plain(a, b, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", note)
    layer = make_layer("cpu", "grouped")
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, 256, 32, requires_grad=True))[0].sum().backward()
    assert left == [0] * 9


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["loop", "grouped", "megablocks"])
def test_experts_without_tokens_get_exactly_no_gradient(backend: str, device: str) -> None:
    """Whatever the memory held: here NaN, in blocks that the allocator will give out again."""
    config = tiny_config(ffn="moe", moe={"num_experts": 8, "expert_dim": 128})
    if backend == "megablocks" and (found := megablocks.obstacle(config, torch.device(device), torch.bfloat16)):
        pytest.skip(f"megablocks {found}")
    layer = make_layer(device, backend, top_k=1)
    with torch.no_grad():
        layer.router.layer.weight[2:] = 0
        layer.router.layer.weight[1] = -layer.router.layer.weight[0]
    x = torch.randn(2, 256, 32, device=device, requires_grad=True)  # as MegaBlocks insists
    for _ in range(2):
        held = [torch.full((8, 128, 32), torch.nan, device=device, dtype=torch.bfloat16) for _ in range(16)]
        del held
        with torch.autocast(device, torch.bfloat16):
            out, stats = layer(x)
        gradients = torch.autograd.grad(out.float().square().sum(), list(layer.experts.mlp.parameters()))
        assert stats.tokens_per_expert[2:].count_nonzero() == 0
        for gradient in gradients:
            assert gradient.isfinite().all()
            assert gradient.unflatten(0, (8, -1))[2:].count_nonzero() == 0
