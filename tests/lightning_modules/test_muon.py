"""Muon's step against one that is written out in fp64, torch's own, and what it makes of singular values."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.config import OptimConfig
from lightning_modules.muon import SCALES, Muon, num_rows, orthogonalize, width_factor
from lightning_modules.optimizers import make_optimizer
from lightning_modules.transformer import Transformer
from lightning_modules.width_scaling import width_scaling
from tests.support.models import VOCAB_SIZE, make_module, tiny_config

LR, DECAY, MOMENTUM = 0.02, 0.3, 0.9


def newton_schulz(x: Tensor) -> Tensor:
    """Five steps of the quintic, in fp64 and by nothing but products of two matrices."""
    x = x.double()
    x = x / x.square().sum().sqrt()
    for _ in range(5):
        cubed = x @ x.T @ x
        x = 3.4445 * x - 4.7750 * cubed + 2.0315 * (x @ x.T @ cubed)
    return x


def split(name: str, weight: Tensor, experts: int) -> list[Tensor]:
    """Return the matrices of a parameter, each [outputs, inputs]: w2 stores an expert's the other way round."""
    if ".mlp." not in name:
        return [weight]
    return [part.T if name.endswith("w2") else part for part in weight.chunk(experts)]


def adjusted(matrix: Tensor, scale: str) -> float:
    outputs, inputs = matrix.shape
    return 0.2 * max(outputs, inputs) ** 0.5 if scale == "match_rms_adamw" else max(1, outputs / inputs) ** 0.5


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_three_steps_beside_a_plain_implementation(ffn: str, scale: str, nesterov: bool) -> None:
    torch.manual_seed(0)
    config = tiny_config(ffn=ffn, num_kv_heads=2)
    model = make_module(ffn=ffn, num_kv_heads=2).model
    assert model is not None
    options = {"scale": scale, "momentum": MOMENTUM, "nesterov": nesterov}
    given = OptimConfig(optimizer="muon", optimizer_options=options, lr=LR, weight_decay=DECAY)
    optimizer = make_optimizer(model, given)
    hidden = {n: p for n, p in model.named_parameters() if n.endswith(("_proj.weight", "w1", "v1", "w2"))}
    others = {n: nn.Parameter(p.detach().clone()) for n, p in model.named_parameters() if n not in hidden}
    assert len(hidden) == 2 * 7
    expected = {n: split(n, p.detach().double().clone(), config.moe.num_experts) for n, p in hidden.items()}
    buffers = {n: [torch.zeros_like(part) for part in parts] for n, parts in expected.items()}
    decays = {n: DECAY if n.endswith(("head.weight", "router.layer.weight")) else 0.0 for n in others}
    adamw = torch.optim.AdamW(
        [{"params": p, "weight_decay": decays[n]} for n, p in others.items()], lr=LR, betas=(0.9, 0.95), eps=1e-8
    )
    for _ in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            if name in others:
                others[name].grad = parameter.grad.clone()
        optimizer.step()
        adamw.step()
        for name, parameter in hidden.items():
            assert parameter.grad is not None
            gradients = split(name, parameter.grad.double(), config.moe.num_experts)
            for part, buffer, gradient in zip(expected[name], buffers[name], gradients, strict=True):
                buffer.copy_(MOMENTUM * buffer + (1 - MOMENTUM) * gradient)
                update = MOMENTUM * buffer + (1 - MOMENTUM) * gradient if nesterov else buffer
                part.mul_(1 - LR * DECAY).sub_(LR * adjusted(part, scale) * newton_schulz(update))
    for name, parameter in hidden.items():
        for found, part in zip(split(name, parameter.detach(), config.moe.num_experts), expected[name], strict=True):
            torch.testing.assert_close(found, part.float(), atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for name, parameter in model.named_parameters():
        if name in others:
            torch.testing.assert_close(parameter, others[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (16, 48)])
def test_two_steps_beside_torchs_muon(shape: tuple[int, int], scale: str) -> None:
    """In bfloat16, as torch's iterates. Its own products are rounded in another order."""
    torch.manual_seed(0)
    mine, torchs = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.empty(shape))
    torchs.data.copy_(mine.data)
    start = mine.detach().clone()
    factor = SCALES[scale](*shape)
    group = {"params": [mine], "matrix_rows": shape[0], "update_factor": factor, "weight_decay": DECAY}
    optimizers = (
        Muon([group], lr=LR, ns_dtype="bfloat16"),
        torch.optim.Muon([torchs], lr=LR, weight_decay=DECAY, adjust_lr_fn=scale),
    )
    for _ in range(2):
        mine.grad = torch.randn(shape)
        torchs.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    difference, moved = (mine - torchs).norm(), (torchs - start).norm()
    assert difference < 0.02 * moved, f"{difference / moved:.4f} of what they moved"


@pytest.mark.parametrize("shape", [(24, 24), (40, 12), (12, 40)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.linspace(0.05, 1, min(shape), dtype=torch.float64)
    out = orthogonalize((left * values) @ right, 5, (3.4445, -4.7750, 2.0315), 1e-7)
    inner = left.T @ out @ right.T
    assert inner.diagonal().min() > 0.6
    assert inner.diagonal().max() < 1.3
    torch.testing.assert_close(inner, inner.diagonal().diag(), atol=1e-9, rtol=0)


def test_a_gradient_of_zeros_moves_nothing_but_decays() -> None:
    weight = nn.Parameter(torch.ones(4, 6))
    optimizer = Muon([{"params": [weight], "matrix_rows": 2, "weight_decay": 0.5}], lr=0.1)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((4, 6), 0.95))


def test_the_sizes_of_updates_are_those_of_adamw() -> None:
    """0.2 to 0.4 in AdamW's runs (2502.16982, section 2.2)."""
    torch.manual_seed(0)
    for ffn in ("dense", "moe"):
        model = make_module(ffn=ffn, dim=64, ffn_dim=192, moe={"expert_dim": 96}).model
        assert model is not None
        optimizer = make_optimizer(model, OptimConfig(optimizer="muon", lr=1.0, weight_decay=0.0))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        for name, parameter in model.named_parameters():
            if name.endswith(("_proj.weight", "w1", "v1", "w2")):
                rms = (parameter - before[name]).square().mean().sqrt()
                assert 0.1 < rms < 0.4, name


def test_state_goes_round_and_a_copy_steps_alike() -> None:
    torch.manual_seed(0)
    model = make_module(ffn="moe").model
    assert model is not None
    config = OptimConfig(optimizer="muon")
    optimizer = make_optimizer(model, config)

    def step(of: Transformer, by: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in of.parameters():
            parameter.grad = torch.randn_like(parameter)
        by.step()

    step(model, optimizer, 1)
    twin = copy.deepcopy(model)
    again = make_optimizer(twin, config)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    both, copied = copy.deepcopy((model, optimizer))
    for of, by in ((model, optimizer), (twin, again), (both, copied)):
        step(of, by, 2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name)), name
        assert torch.equal(parameter, both.get_parameter(name)), name


@pytest.mark.parametrize(("scale", "factor"), [("original", 1.0), ("match_rms_adamw", 0.5)])
def test_a_wider_model_gets_the_same_spectral_norm(scale: str, factor: float) -> None:
    """Four times as wide, the update of a hidden matrix has its norm at the base width."""
    model = Transformer(tiny_config(dim=128, ffn_dim=None, num_heads=4), VOCAB_SIZE)
    optim = OptimConfig(optimizer="muon", width_scaling="mup", base_width=32)
    scaling = width_scaling(model.config, optim)
    hidden = [matrix for matrix in model.matrices() if matrix.role not in ("embedding", "head")]
    for matrix in hidden:
        assert width_factor(scaling, matrix, SCALES[scale]) == pytest.approx(factor, rel=0.05), matrix.role


def test_an_explicit_width_keeps_the_spectral_condition() -> None:
    """sqrt(outputs / inputs) of the updates' norm (2310.17813) relative to the base, whatever the scale."""
    model = Transformer(tiny_config(dim=128, ffn_dim=48, num_heads=4), VOCAB_SIZE)
    optim = OptimConfig(optimizer="muon", width_scaling="mup", base_width=32)
    scaling = width_scaling(model.config, optim)
    down = next(matrix for matrix in model.matrices() if matrix.role == "ffn_down")
    for scale in SCALES.values():
        norm = width_factor(scaling, down, scale) * scale(128, 48)
        assert norm / scale(32, 48) == pytest.approx(2.0)


def test_an_experts_rows_are_those_of_one_expert() -> None:
    model: Any = Transformer(tiny_config(ffn="moe", moe={"expert_dim": 24}), VOCAB_SIZE)
    rows = {matrix.role: num_rows(matrix) for matrix in model.matrices()}
    assert (rows["ffn_up"], rows["ffn_down"], rows["query"]) == (24, 24, 32)
