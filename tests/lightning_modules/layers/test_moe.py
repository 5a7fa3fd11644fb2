"""The mixture of experts against every expert on every token, and its losses against their formulae."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from core.errors import ConfigError
from lightning_modules.layers.moe import MoE
from lightning_modules.transformer import Transformer
from tests.support import reference
from tests.support.models import tiny_config
from tests.support.moe import BACKENDS, inputs, make_moe, send_all_to


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("case", "shape"),
    [
        ({"num_experts": 4, "top_k": 2}, (2, 9)),
        ({"num_experts": 4, "top_k": 1}, (2, 9)),
        ({"num_experts": 4, "top_k": 2, "normalize_weights": False}, (2, 9)),
        ({"num_experts": 3, "top_k": 3}, (2, 9)),
        ({"num_experts": 1, "top_k": 1}, (2, 9)),
        ({"num_experts": 8, "top_k": 2}, (1, 1)),  # a single token; six experts idle
        ({"num_experts": 4, "top_k": 1, "normalize_weights": False, "taker": 2}, (2, 9)),  # one expert takes all
        ({"num_experts": 4, "top_k": 2, "inner_norm": True}, (2, 9)),
    ],
    ids=str,
)
def test_output_and_gradients_equal_the_plain_mixture(
    case: dict[str, Any], shape: tuple[int, int], backend: str
) -> None:
    case = dict(case)
    taker, inner_norm = case.pop("taker", None), case.pop("inner_norm", False)
    layer, x = make_moe(inner_norm, **case, backend=backend), inputs(*shape)
    if taker is not None:
        send_all_to(layer, taker)
    weights = dict(layer.named_parameters())
    options: dict[str, Any] = {"normalize": case.get("normalize_weights", case["top_k"] > 1)}
    if inner_norm:
        gain = weights["experts.mlp.inner_norm.weight"]
        options["inner"] = lambda h: reference.rms_norm(h, gain, 1e-5)

    actual, stats = layer(x)
    expected = reference.moe(x.flatten(0, 1), weights, case["num_experts"], case["top_k"], **options).view_as(x)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)

    assert stats.tokens_per_expert.sum() == x[..., 0].numel() * case["top_k"]  # dropless
    if taker is not None:
        assert stats.tokens_per_expert.tolist() == [0, 0, 18, 0]

    direction = torch.randn_like(x)
    of = [x, *weights.values()]
    actual_grads = torch.autograd.grad((actual * direction).sum(), of)
    expected_grads = torch.autograd.grad((expected * direction).sum(), of)
    for name, a, e in zip(["x", *weights], actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_statistics_are_their_formulae(top_k: int) -> None:
    layer, x = make_moe(top_k=top_k), inputs(2, 9)
    _, stats = layer(x)

    logits = x.detach().flatten(0, 1).double().numpy() @ layer.router.layer.weight.detach().double().numpy().T
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    chosen = np.argsort(-scores, axis=1)[:, :top_k]
    counts = np.bincount(chosen.flatten(), minlength=4)
    balance = sum(4 / (18 * top_k) * counts[e] * scores[:, e].mean() for e in range(4))
    z_loss = np.mean(np.log(np.exp(logits).sum(axis=1)) ** 2)

    assert stats.tokens_per_expert.tolist() == counts.tolist()
    assert stats.load_balancing_loss.item() == pytest.approx(balance, rel=1e-5)
    assert stats.z_loss.item() == pytest.approx(z_loss, rel=1e-5)


def test_load_balancing_loss_is_one_at_balance_and_the_number_of_experts_at_collapse() -> None:
    layer = make_moe(top_k=1)
    with torch.no_grad():
        layer.router.layer.weight.zero_()
        layer.router.layer.weight[:, :4] = 50 * torch.eye(4)
    one_each, all_one = torch.eye(4, 32)[None], torch.eye(1, 32).expand(1, 4, 32)
    assert layer(one_each)[1].load_balancing_loss.item() == pytest.approx(1.0)
    assert layer(all_one)[1].load_balancing_loss.item() == pytest.approx(4.0)


def test_counts_carry_no_gradient_and_the_losses_reach_only_the_router() -> None:
    layer = make_moe()
    _, stats = layer(inputs(2, 9))
    assert not stats.tokens_per_expert.requires_grad
    (stats.load_balancing_loss + stats.z_loss).backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"router.layer.weight"}


def test_jitter_disturbs_the_router_in_training_only() -> None:
    layer, x = make_moe(jitter=0.5), inputs(2, 9)
    plain = make_moe()
    plain.load_state_dict(layer.state_dict())
    assert not torch.equal(layer(x)[0], layer(x)[0])
    torch.testing.assert_close(layer.eval()(x)[0], plain(x)[0], atol=0, rtol=0)

    lone = make_moe(num_experts=1, top_k=1, jitter=0.5)  # its gate is 1 whatever the noise
    torch.testing.assert_close(lone(x)[0], lone.eval()(x)[0], atol=0, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_bf16_autocast_the_router_stays_in_fp32(backend: str) -> None:
    layer, x = make_moe(backend=backend), inputs(2, 9)
    exact, exact_stats = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out, stats = layer(x)
    for name in ("load_balancing_loss", "z_loss", "tokens_per_expert"):
        torch.testing.assert_close(getattr(stats, name), getattr(exact_stats, name), atol=0, rtol=0)
    error = (out - exact).norm() / exact.norm()
    assert 0 < error < 0.02  # bf16 has 8 bits; none at all would mean that autocast did not reach the experts
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_experts_outputs_in_bf16_are_weighted_in_fp32(autocast: bool) -> None:
    layer, x, computed = make_moe(top_k=1, normalize_weights=False), inputs(2, 9), []
    if not autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    layer.experts.mlp.register_forward_hook(lambda *arguments: computed.append(arguments[-1]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(x)[0].flatten(0, 1)
        weights, experts, _ = layer.router(x.flatten(0, 1))
    (rows,), order = computed, experts.flatten().argsort(stable=True)
    assert rows.dtype == torch.bfloat16
    torch.testing.assert_close(out[order], (rows.float() * weights[order]).to(x.dtype), atol=0, rtol=0)


class FP32Norm(nn.Module):
    """Gives fp32 whatever it takes, as torch's own layer norm does under autocast on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_bf16_autocast_an_inner_norm_may_give_fp32(backend: str) -> None:
    layer, x = make_moe(backend=backend), inputs(2, 9)
    layer.experts.mlp.inner_norm = FP32Norm()
    exact = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)[0]
    assert 0 < (out - exact).norm() / exact.norm() < 0.02
    out.sum().backward()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_equals_the_plain_mixture(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 9))
    case = {
        "num_experts": num_experts,
        "top_k": data.draw(st.integers(1, num_experts)),
        "expert_dim": 8 * data.draw(st.integers(1, 4)),
        "normalize_weights": data.draw(st.booleans()),
        "backend": data.draw(st.sampled_from(BACKENDS)),
    }
    torch.manual_seed(data.draw(st.integers(0, 2**16)))  # so that an example can be replayed
    layer, x = make_moe(**case), inputs(data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12)))
    if case["top_k"] == 1 and data.draw(st.booleans()):
        send_all_to(layer, data.draw(st.integers(0, num_experts - 1)))
    weights = dict(layer.named_parameters())
    actual, stats = layer(x)
    expected = reference.moe(x.flatten(0, 1), weights, num_experts, case["top_k"], case["normalize_weights"])
    torch.testing.assert_close(actual, expected.view_as(x), atol=1e-5, rtol=1e-4)
    assert stats.tokens_per_expert.sum() == x[..., 0].numel() * case["top_k"]
    actual_grads = torch.autograd.grad(actual.square().sum(), [x, *weights.values()])
    expected_grads = torch.autograd.grad(expected.square().sum(), [x, *weights.values()])
    largest = max(gradient.abs().max().item() for gradient in expected_grads)  # small ones are differences of such
    for name, a, e in zip(["x", *weights], actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, e, atol=1e-5 * largest, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("inner_norm", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_compiles_and_computes_the_same(backend: str, inner_norm: bool) -> None:
    layer, x = make_moe(inner_norm, backend=backend, num_shared_experts=1), inputs(2, 9)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for run in (layer, compiled):
        out, stats = run(x)
        loss = out.square().mean() + stats.load_balancing_loss + stats.z_loss
        results.append((out, *stats, *torch.autograd.grad(loss, [x, *layer.parameters()])))
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("moe", "mixtures"),
    [
        ({}, [1, 2, 3, 4, 5, 6]),
        ({"first_dense_layers": 2}, [3, 4, 5, 6]),
        ({"layer_interval": 2}, [2, 4, 6]),
        ({"first_dense_layers": 1, "layer_interval": 3}, [4]),
    ],
    ids=str,
)
def test_which_layers_are_mixtures_and_what_they_weigh(moe: dict[str, Any], mixtures: list[int]) -> None:
    model = Transformer(tiny_config(ffn="moe", num_layers=6, moe={**moe, "num_shared_experts": 1}), 50)
    assert list(model.mixtures()) == mixtures
    assert [n for n, block in enumerate(model.blocks, 1) if isinstance(block.ffn, MoE)] == mixtures
    assert len(model(torch.zeros(1, 4, dtype=torch.long))[1]) == len(mixtures)
    total, active = model.num_parameters()
    assert total == sum(p.numel() for p in model.parameters())
    assert total - active == len(mixtures) * 2 * 3 * 24 * 32  # two of four experts idle
    matrices = {id(matrix.weight) for matrix in model.matrices()}
    assert matrices == {id(p) for p in model.parameters() if p.dim() == 2}
    roles = Counter(matrix.role for matrix in model.matrices())
    assert roles["ffn_down"] == 6 + len(mixtures)  # one in each layer, and that of each shared expert


def test_no_mixture_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.moe\.layer_interval=2 .* model\.num_layers=2"):
        Transformer(tiny_config(ffn="moe", moe={"first_dense_layers": 1, "layer_interval": 2}), 50)
