"""Measurements against the same figures taken by hand, and what they say at depth 64 and 128."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.propagation import BlockSignal, measure
from analysis.states import effective_rank, kurtosis, mean_cosine
from lightning_modules.config import ModelConfig
from lightning_modules.initialization import initialize
from lightning_modules.layers.rope import rope_tables
from lightning_modules.transformer import Block, Transformer

VOCAB_SIZE = 64


def build(**fields: object) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**fields), VOCAB_SIZE)  # type: ignore[arg-type]
    initialize(model)
    return model


def deep(placement: str, init: str, num_layers: int) -> list[BlockSignal]:
    model = build(placement=placement, init=init, num_layers=num_layers, dim=128)
    return measure(model, {"tokens": torch.randint(VOCAB_SIZE, (2, 17))})


def gradient_ratio(signals: list[BlockSignal]) -> float:
    return signals[0].hidden_gradient / signals[-1].hidden_gradient


@pytest.mark.parametrize("num_layers", [64, 128])
@pytest.mark.parametrize("placement", ["postnorm", "spannorm"])
def test_scaled_branches_keep_gradients_in_bounds(placement: str, num_layers: int) -> None:
    assert 0.5 < gradient_ratio(deep(placement, "scale_init", num_layers)) < 2


@pytest.mark.parametrize("placement", ["postnorm", "spannorm"])
def test_unscaled_branches_explode(placement: str) -> None:
    signals = deep(placement, "fan_in", 128)
    assert gradient_ratio(signals) > 1e3
    assert (signals[-1].cosine > 0.99) == (placement == "postnorm")  # of the two, only PostNorm's tokens collapse


@pytest.mark.parametrize("num_layers", [64, 128])
def test_prenorm_variance_grows_linearly(num_layers: int) -> None:
    blocks = np.arange(1, num_layers + 1)
    variance = np.array([signal.variance for signal in deep("prenorm", "fan_in", num_layers)])
    slope, _ = np.polyfit(blocks, variance, 1)
    assert np.corrcoef(blocks, variance)[0, 1] ** 2 > 0.98
    assert variance[-1] / num_layers == pytest.approx(slope, rel=0.2)
    assert slope > 0.3


@pytest.mark.parametrize(("seq", "dim"), [(12, 20), (20, 12)])
def test_cosine_and_rank_of_hidden_states(seq: int, dim: int) -> None:
    x = torch.randn(3, seq, dim) + 0.5
    cosines, ranks = [], []
    for sequence in x.double().numpy():
        unit = sequence / np.linalg.norm(sequence, axis=1, keepdims=True)
        cosines += [unit[s] @ unit[t] for s in range(seq) for t in range(seq) if s != t]
        p = np.linalg.svd(sequence, compute_uv=False)
        p /= p.sum()
        ranks.append(np.exp(-(p * np.log(p)).sum()))
    assert float(mean_cosine(x)) == pytest.approx(np.mean(cosines), rel=1e-4)
    assert float(effective_rank(x)) == pytest.approx(np.mean(ranks), rel=1e-4)


def test_kurtosis() -> None:
    x = torch.randn(2, 5, 30) + 0.5
    per_token = [(token**4).mean() / (token**2).mean() ** 2 for token in x.double().numpy().reshape(-1, 30)]
    assert float(kurtosis(x)) == pytest.approx(np.mean(per_token), rel=1e-4)
    assert float(kurtosis(torch.eye(30)[None])) == pytest.approx(30)


def test_effective_rank_of_special_states() -> None:
    assert float(effective_rank(torch.eye(7)[None])) == pytest.approx(7)
    assert float(effective_rank(torch.ones(1, 7, 5))) == pytest.approx(1, abs=1e-5)
    assert np.isnan(float(effective_rank(torch.full((1, 7, 5), torch.inf))))


@pytest.mark.parametrize(
    ("placement", "ffn_kind", "norm"), [("prenorm", "dense", "rmsnorm"), ("spannorm", "moe", "layernorm")]
)
def test_figures_are_those_of_a_pass_by_hand(placement: str, ffn_kind: str, norm: str) -> None:
    model = build(placement=placement, ffn=ffn_kind, norm=norm, init="fan_in", num_layers=3, dim=32)
    tokens = torch.randint(VOCAB_SIZE, (2, 9))
    signals = measure(model, {"tokens": tokens})
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())

    rope = rope_tables(8, 8, 1e4, torch.device("cpu"))
    states = [model.embedding(tokens[:, :-1])]
    for signal, block in zip(signals, model.blocks, strict=True):
        outputs: list[Tensor] = []

        def attn(h: Tensor, block: Block = block, outputs: list[Tensor] = outputs) -> Tensor:
            return outputs.append(block.attn(h, rope)) or outputs[-1]

        def ffn(h: Tensor, block: Block = block, outputs: list[Tensor] = outputs) -> Tensor:
            return outputs.append(block.ffn(h)[0]) or outputs[-1]

        states.append(block.placement(states[-1], attn, ffn))
        states[-1].retain_grad()
        ratios = [(out.square().mean() / states[-2].square().mean()).item() for out in outputs]
        assert [signal.attn_ratio, signal.ffn_ratio] == pytest.approx(ratios, rel=1e-4)
    logits = model.head(model.blocks[-1].placement.leave(states[-1]))
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for signal, state, block in zip(signals, states[1:], model.blocks, strict=True):
        assert signal.variance == pytest.approx(state.square().mean().item(), rel=1e-4)
        assert signal.hidden_gradient == pytest.approx(float(state.grad.norm()), rel=1e-4)
        for name in ("attn", "ffn"):
            squares = sum(float(p.grad.square().sum()) for p in getattr(block, name).parameters())
            assert getattr(signal, f"{name}_gradient") == pytest.approx(squares**0.5, rel=1e-4)


def test_two_streams_are_measured_side_by_side() -> None:
    model = build(placement="residual", init="fan_in", num_layers=2, dim=32)
    tokens, kept = torch.randint(VOCAB_SIZE, (2, 9)), []
    model.blocks[0].placement.register_forward_hook(lambda module, inputs, output: kept.append(output))
    first = measure(model, {"tokens": tokens})[0]
    h, r = kept[0]
    both = torch.cat((h, r), dim=-1).detach()
    assert first.variance == pytest.approx((h.square().mean() + r.square().mean()).item() / 2, rel=1e-5)
    assert first.cosine == pytest.approx(float(mean_cosine(both)))
    logits = model(tokens[:, :-1])[0]
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, kept[1])
    norm = sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5
    assert first.hidden_gradient == pytest.approx(norm, rel=1e-4)
