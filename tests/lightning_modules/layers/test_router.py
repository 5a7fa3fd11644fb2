"""The router: whom it selects, with what weights, what it reports, and how its bias balances."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from core.errors import ConfigError
from lightning_modules.layers.router import Router
from tests.support.models import tiny_config

NUM_EXPERTS, NUM_TOKENS = 4, 20


def make_router(**moe: Any) -> Router:
    router = Router(tiny_config(ffn="moe", moe=moe))
    torch.nn.init.normal_(router.layer.weight, std=0.3)
    return router


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_selection_weights_and_statistics_are_their_formulae(
    top_k: int, score: str, biased: bool, normalize: bool
) -> None:
    router = make_router(top_k=top_k, score=score, balancing="bias" if biased else "loss", normalize_weights=normalize)
    bias = np.array([0.4, -0.4, 0.0, 0.1]) if biased else np.zeros(4)
    if router.expert_bias is not None:
        router.expert_bias.copy_(torch.tensor(bias))
    x = torch.randn(NUM_TOKENS, 32)
    weights, experts, stats = router(x)

    logits = x.double().numpy() @ router.layer.weight.detach().double().numpy().T
    exp = np.exp(logits)
    scores = exp / exp.sum(axis=1, keepdims=True) if score == "softmax" else exp / (1 + exp)
    chosen = np.argsort(-(scores + bias), axis=1)[:, :top_k]
    expected = np.take_along_axis(scores, chosen, axis=1)  # the bias selects, and is no part of the weights
    if normalize:
        expected = expected / expected.sum(axis=1, keepdims=True)
    assert np.array_equal(experts.numpy(), chosen)
    np.testing.assert_allclose(weights.detach().numpy(), expected, rtol=1e-5)

    p = scores / scores.sum(axis=1, keepdims=True)
    counts = np.bincount(chosen.flatten(), minlength=NUM_EXPERTS)
    two = np.sort(p, axis=1)[:, ::-1]
    formulae = {
        "tokens_per_expert": counts,
        "load_balancing_loss": NUM_EXPERTS / (NUM_TOKENS * top_k) * (counts * p.mean(axis=0)).sum(),
        "z_loss": (np.log(exp.sum(axis=1)) ** 2).mean(),
        "entropy": -(p * np.log(p)).sum(axis=1).mean(),
        "top1_margin": (two[:, 0] - two[:, 1]).mean(),
        "logits_norm": np.sqrt((logits**2).sum(axis=1)).mean(),
    }
    assert stats._fields == tuple(formulae)
    for name, value in formulae.items():
        np.testing.assert_allclose(getattr(stats, name).detach().numpy(), value, rtol=1e-5, err_msg=name)
        assert getattr(stats, name).requires_grad == name.endswith("_loss")


def test_a_lone_expert_is_certain() -> None:
    weights, _, stats = make_router(num_experts=1, top_k=1)(torch.randn(3, 32))
    assert weights.tolist() == [[1.0]] * 3
    assert (stats.entropy.item(), stats.top1_margin.item()) == (0.0, 1.0)


def test_of_no_doubt_at_all_the_entropy_is_none() -> None:
    router = make_router()
    torch.nn.init.eye_(router.layer.weight)
    _, _, stats = router(1000 * torch.eye(4, 32))  # all other probabilities are 0 in fp32
    assert stats.entropy.item() == 0.0


def test_a_double_one_computes_in_double() -> None:
    router, x = make_router().double(), torch.randn(NUM_TOKENS, 32, dtype=torch.float64)
    weights, experts, stats = router(x)
    scores = (x @ router.layer.weight.T).softmax(dim=-1).gather(-1, experts)
    torch.testing.assert_close(weights, scores / scores.sum(dim=-1, keepdim=True), atol=0, rtol=1e-12)
    assert {value.dtype for value in stats} == {torch.float64}


def test_sigmoid_scores_of_zero_stay_finite() -> None:
    router = make_router(score="sigmoid")
    torch.nn.init.constant_(router.layer.weight, -100.0)
    weights, _, stats = router(torch.ones(3, 32, requires_grad=True))
    (weights.sum() + stats.load_balancing_loss).backward()
    assert weights.isfinite().all()
    assert router.layer.weight.grad is not None
    assert router.layer.weight.grad.isfinite().all()


def test_jitter_multiplies_each_feature_by_a_uniform_number_around_one() -> None:
    router = make_router(num_experts=32, top_k=32, score="sigmoid", normalize_weights=False, jitter=0.25)
    torch.nn.init.eye_(router.layer.weight)  # logits are features, and weights their sigmoids
    weights, experts, _ = router(torch.full((400, 32), 2.0))
    noise = torch.empty(400, 32).scatter(1, experts, weights.detach().logit() / 2)
    assert (noise.min().item(), noise.max().item()) == pytest.approx((0.75, 1.25), abs=1e-3)
    for dim in (0, 1):  # of its own for each token, and for each of its features
        assert noise.mean(dim).sub(1).abs().max() < 0.15
        assert noise.std(dim).mean().item() == pytest.approx(0.5 / 12**0.5, rel=0.02)


def test_the_bias_moves_by_the_sign_of_the_load_error_and_is_saved() -> None:
    router = make_router(balancing="bias", bias_update_rate=0.5)
    router.update_bias(torch.tensor([8.0, 1.0, 4.0, 3.0]))  # the mean is 4
    assert router.expert_bias is not None
    assert router.expert_bias.tolist() == [-0.5, 0.5, 0.0, 0.5]
    assert "expert_bias" in router.state_dict()
    assert "expert_bias" not in dict(router.named_parameters())

    other = make_router(balancing="loss")
    other.update_bias(torch.tensor([8.0, 1.0, 4.0, 3.0]))
    assert list(other.state_dict()) == ["layer.weight"]


def cast(router: Router) -> Router:
    return router.to(torch.bfloat16)


def build_cast(router: Router) -> Router:
    torch.set_default_dtype(torch.bfloat16)
    try:
        return make_router(balancing="bias")
    finally:
        torch.set_default_dtype(torch.float32)


def materialize(router: Router) -> Router:
    return router.to("meta").bfloat16().to_empty(device="cpu")


@pytest.mark.parametrize("to_bf16", [cast, build_cast, materialize])
def test_small_updates_of_the_bias_add_up_in_a_bf16_model(to_bf16: Callable[[Router], Router]) -> None:
    router = make_router(balancing="bias", bias_update_rate=0.001)
    router.update_bias(torch.tensor([2.0, 1.0, 1.0, 0.0]))
    router = to_bf16(router)
    assert router.layer.weight.dtype == torch.bfloat16
    assert router.expert_bias is not None
    if to_bf16 is cast:
        assert router.expert_bias.tolist() == pytest.approx([-0.001, 0.0, 0.0, 0.001], rel=1e-6), "not rounded"
    router.expert_bias.zero_()
    for _ in range(1000):
        router.update_bias(torch.tensor([2.0, 1.0, 1.0, 0.0]))
    assert router.expert_bias.tolist() == pytest.approx([-1.0, 0.0, 0.0, 1.0], rel=1e-4)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_bias_alone_balances_a_skewed_router(score: str) -> None:
    router = make_router(balancing="bias", bias_update_rate=0.002, score=score)
    torch.nn.init.normal_(router.layer.weight, std=0.05)
    x = torch.randn(256, 32) + 4 * router.layer.weight[1].detach() / router.layer.weight[1].norm().item()
    loads = []
    for _ in range(400):
        counts = router(x)[2].tokens_per_expert
        loads.append((counts.max() / counts.mean()).item())
        router.update_bias(counts)
    assert loads[0] > 1.5
    assert loads[-1] < 1.1


@pytest.mark.parametrize(("name", "valid"), [("score", "sigmoid, softmax"), ("balancing", "bias, loss, none")])
def test_an_unknown_kind_is_refused(name: str, valid: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.moe\.{name}='lss' is not valid: expected one of {valid}"):
        make_router(**{name: "lss"})


def test_in_evaluation_no_other_process_is_asked() -> None:
    """It may be alone at it. torch's fake group sums over one process, so that the mean over two is half of its own."""
    router, x = make_router(), torch.randn(NUM_TOKENS, 32)
    alone = router(x)[2].load_balancing_loss
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        torch.testing.assert_close(router(x)[2].load_balancing_loss, alone / 2)
        torch.testing.assert_close(router.eval()(x)[2].load_balancing_loss, alone)
    finally:
        dist.destroy_process_group()
