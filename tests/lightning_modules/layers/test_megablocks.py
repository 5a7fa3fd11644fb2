"""Our mixture against the real megablocks package, both as a layer of its own and as a backend of ours."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.layers.moe import MoE
from tests.support.fitting import Recorder, loader, make_trainer
from tests.support.megablocks_cpu import megablocks_on_cpu
from tests.support.models import make_module, tiny_config, tokens

NUM_EXPERTS, HIDDEN, BALANCE_WEIGHT, Z_WEIGHT = 6, 24, 0.1, 0.01
BACKENDS = ["loop", "grouped", "megablocks"]


@pytest.fixture
def megablocks() -> Iterator[None]:
    with megablocks_on_cpu():
        yield


def make_dmoe(top_k: int, normalize: bool, shared: bool) -> nn.Module:
    """The package's own layer, with its own router and losses."""
    arguments = importlib.import_module("megablocks.layers.arguments").Arguments(
        hidden_size=32,
        ffn_hidden_size=HIDDEN,
        moe_num_experts=NUM_EXPERTS,
        moe_top_k=top_k,
        moe_normalize_expert_weights=1 if normalize else None,
        moe_loss_weight=BALANCE_WEIGHT,
        moe_zloss_weight=Z_WEIGHT,
        mlp_type="glu",
        mlp_impl="grouped",
        memory_optimized_mlp=True,
        activation_fn=F.silu,
        bias=False,
        fp16=False,
        device="cpu",
        shared_expert=shared,
        shared_expert_hidden_size=40,
        shared_expert_weighted_sum=True,
    )
    return importlib.import_module("megablocks.layers.dmoe").dMoE(arguments)


def make_ours(backend: str, top_k: int = 2, **moe: Any) -> MoE:
    values = {"num_experts": NUM_EXPERTS, "expert_dim": HIDDEN, "top_k": top_k, "backend": backend, **moe}
    layer = MoE(tiny_config(ffn="moe", moe=values))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.2)
    return layer


def gradients(loss: Tensor, layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    parameters = dict(layer.named_parameters())
    grads = torch.autograd.grad(loss, [x, *parameters.values()])
    return dict(zip(["x", *parameters], grads, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.usefixtures("megablocks")
def test_outputs_losses_and_gradients_are_those_of_the_package(
    top_k: int, normalize: bool, shared: bool, backend: str
) -> None:
    moe = importlib.import_module("megablocks.layers.moe")
    router = importlib.import_module("megablocks.layers.router")
    options = {"num_shared_experts": 1, "shared_expert_dim": 40, "shared_expert_weighted_sum": True} if shared else {}
    ours = make_ours(backend, top_k, normalize_weights=normalize, **options)
    theirs = make_dmoe(top_k, normalize, shared)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 17, 32, requires_grad=True)

    moe.clear_load_balancing_loss()
    router.clear_router_zloss()
    expected = theirs(x)
    balance = moe.batched_load_balancing_loss(theirs.experts.args)
    z_loss = router.batched_router_zloss(theirs.experts.args).sum()
    actual, stats = ours(x)

    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(actual, expected, **close)
    torch.testing.assert_close(BALANCE_WEIGHT * stats.load_balancing_loss, balance, **close)
    torch.testing.assert_close(Z_WEIGHT * stats.z_loss, z_loss, **close)

    direction = torch.randn_like(x)
    losses = BALANCE_WEIGHT * stats.load_balancing_loss + Z_WEIGHT * stats.z_loss
    actual_grads = gradients((actual * direction).sum() + losses, ours, x)
    expected_grads = gradients((expected * direction).sum() + balance + z_loss, theirs, x)
    assert actual_grads.keys() == expected_grads.keys()
    torch.testing.assert_close(actual_grads, expected_grads, **close)
    assert len(moe.get_load_balancing_loss()) == 1, "theirs; ours goes by return value"


@pytest.mark.parametrize("into", BACKENDS)
@pytest.mark.parametrize("trained_with", BACKENDS)
@pytest.mark.usefixtures("megablocks")
def test_a_checkpoint_changes_backend(trained_with: str, into: str) -> None:
    source, target, x = make_ours(trained_with), make_ours(into), torch.randn(2, 9, 32)
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target(x)[0], source(x)[0], atol=1e-5, rtol=1e-5)
    shapes = {f"experts.mlp.{name}": (NUM_EXPERTS * HIDDEN, 32) for name in ("w1", "v1", "w2")}
    expected = list({"router.layer.weight": (NUM_EXPERTS, 32), **shapes}.items())  # optimizer states go by number
    assert [(name, weight.shape) for name, weight in target.named_parameters()] == expected


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")  # one batch, again
@pytest.mark.parametrize("into", ["grouped", "megablocks"])
@pytest.mark.usefixtures("megablocks")
def test_a_run_goes_on_with_another_backend_and_the_same_optimizer_state(into: str, tmp_path: Path) -> None:
    batches, checkpoint = loader(*[tokens(2, 9)] * 4), tmp_path / "a.ckpt"

    def losses(backend: str, max_steps: int, ckpt_path: Path | None = None) -> list[float]:
        torch.manual_seed(0)
        moe, recorder = {"backend": backend, "expert_dim": 32}, Recorder()
        module = make_module({"schedule": "constant"}, ffn="moe", moe=moe)
        trainer = make_trainer(tmp_path, limit_val_batches=0, max_steps=max_steps, logger=recorder)
        trainer.fit(module, batches, batches, ckpt_path=ckpt_path)
        if max_steps == 2:
            trainer.save_checkpoint(checkpoint)
        return recorder.series("train/loss")

    losses("loop", max_steps=2)
    expected = losses("loop", max_steps=4)[2:]
    assert losses(into, max_steps=4, ckpt_path=checkpoint) == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("megablocks")
def test_experts_without_tokens_get_no_gradient_and_not_what_the_memory_held() -> None:
    """The products of the tests leave it as NaN."""
    theirs, ours = make_ours("megablocks", top_k=1), make_ours("loop", top_k=1)
    with torch.no_grad():
        theirs.router.layer.weight[2:] = 0  # beside which either of the first two has the largest logit
        theirs.router.layer.weight[1] = -theirs.router.layer.weight[0]
    ours.load_state_dict(theirs.state_dict())
    x, grads = torch.randn(2, 9, 32, requires_grad=True), []
    for layer in (theirs, ours):
        out, stats = layer(x)
        assert stats.tokens_per_expert.tolist()[2:] == [0.0] * (NUM_EXPERTS - 2)
        grads.append(torch.autograd.grad(out.square().sum(), list(layer.experts.mlp.parameters())))
    for actual, expected in zip(*grads, strict=True):
        assert actual.unflatten(0, (NUM_EXPERTS, -1))[2:].count_nonzero() == 0
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("megablocks")
def test_under_autocast_the_tokens_are_cast_before_they_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, copied = importlib.import_module("megablocks.backend.kernels"), []
    gather = kernels.gather
    monkeypatch.setattr(kernels, "gather", lambda x, *rest: copied.append(x.dtype) or gather(x, *rest))
    theirs, ours, x = make_ours("megablocks"), make_ours("loop"), torch.randn(2, 9, 32)
    theirs.load_state_dict(ours.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = theirs(x)[0], ours(x)[0]
    assert copied == [torch.bfloat16]
    assert (actual - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.usefixtures("megablocks")
def test_a_whole_model_has_the_loss_and_gradients_of_the_loop(checkpointing: bool) -> None:
    batch, results, weights = tokens(2, 9), [], None
    for backend in ("loop", "megablocks"):
        module = make_module(
            ffn="moe", moe={"backend": backend, "expert_dim": 32}, activation_checkpointing=checkpointing
        )
        weights = weights or module.state_dict()
        module.load_state_dict(weights)
        logits, stats = module(batch)
        loss = logits.square().mean() + sum(s.load_balancing_loss + s.z_loss for s in stats)
        names, parameters = zip(*module.named_parameters(), strict=True)
        results.append({"loss": loss, **dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))})
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
