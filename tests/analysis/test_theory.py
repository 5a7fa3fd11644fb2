"""The recurrences against closed forms at one position, and against the models they are about."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from analysis.kernels import Gains
from analysis.propagation import BlockSignal, measure
from analysis.theory import SCHEMES, Prediction, predict, predict_model, read_gains
from lightning_modules.config import ModelConfig
from lightning_modules.initialization import initialize
from lightning_modules.transformer import Block, Transformer

F, CHI = 0.355776, 0.735258  # E silu(u)^2, and that plus E silu'(u)^2, for a standard normal u
VOCAB_SIZE = 256


def model_of(placement: str, init: str, num_layers: int, seed: int = 0, **fields: object) -> Transformer:
    torch.manual_seed(seed)
    config = ModelConfig(placement=placement, init=init, num_layers=num_layers, dim=128, **fields)  # type: ignore[arg-type]
    model = Transformer(config, VOCAB_SIZE)
    initialize(model)
    return model


def both(placement: str, init: str, num_layers: int, seed: int = 0) -> tuple[list[BlockSignal], list[Prediction]]:
    model = model_of(placement, init, num_layers, seed)
    predictions = predict_model(model, seq_len=32)
    assert predictions is not None
    return measure(model, {"tokens": torch.randint(VOCAB_SIZE, (6, 33))}), predictions


def alone(placement: str, num_layers: int, branch: float) -> list[Prediction]:
    """One position attends to itself alone: A passes variance and gradient on, F gives F and CHI, both x branch."""
    gains = Gains(attn_out=branch, ffn_down=branch)
    return predict(SCHEMES[placement](num_layers), [gains] * num_layers, seq_len=1)


@pytest.mark.parametrize("branch", [1.0, 1 / 8])
def test_one_position_in_closed_form(branch: float) -> None:
    num_layers, a, f, chi = 8, branch, branch * F, branch * CHI
    alpha = (2 * num_layers) ** 0.5  # squared
    per_block = {  # variance of the gradient before over after a block: skip path, full Jacobian
        "postnorm": (1 / ((1 + a) * (1 + f)), (1 + chi) / (1 + f)),
        "spannorm": (1 / (1 + f), (1 + chi) / (1 + f)),
        "deepnorm": (alpha**2 / ((alpha + a) * (alpha + f)), (alpha + chi) / (alpha + f)),
    }
    for placement, (skip, full) in per_block.items():
        predictions = alone(placement, num_layers, branch)
        assert [p.variance for p in predictions] == pytest.approx([1.0] * num_layers)
        assert (predictions[2].attn_ratio, predictions[2].ffn_ratio) == pytest.approx((a, f), rel=1e-4)
        assert predictions[0].skip_gradient == pytest.approx(skip ** ((num_layers - 1) / 2), rel=1e-4)
        assert predictions[0].hidden_gradient == pytest.approx(full ** ((num_layers - 1) / 2), rel=1e-4)

    prenorm, variance, gradient = alone("prenorm", num_layers, branch), 1.0, 1.0
    for block, prediction in enumerate(prenorm):
        if block:
            gradient *= (1 + a / variance) * (1 + chi / (variance + a))
        variance += a + f
        assert prediction.variance == pytest.approx(variance, rel=1e-4)
        assert prediction.skip_gradient == 1.0
    assert prenorm[0].hidden_gradient == pytest.approx(math.sqrt(gradient), rel=1e-4)


def test_spannorms_first_attention_reads_a_normed_embedding_and_skips_a_raw_one() -> None:
    first, second = predict(SCHEMES["spannorm"](2), [Gains()] * 2, seq_len=1, embedding=4.0)
    assert (first.attn_ratio, first.ffn_ratio) == pytest.approx((1 / 4, F / 4), rel=1e-4)
    assert (second.attn_ratio, second.ffn_ratio) == pytest.approx((1, F), rel=1e-4)
    # The skip carries the raw embedding: its similarity of 1/4 counts with its variance of 4 beside the FFN's.
    similar = predict(SCHEMES["spannorm"](1), [Gains(attn_out=0)], seq_len=2, embedding=4.0, repeats=0.25)[0]
    assert similar.cosine == pytest.approx((4 * 0.25 + swiglu(0.25)) / (4 + F), rel=1e-4)


def swiglu(similarity: float) -> float:
    """Inner product of a SwiGLU's outputs for two inputs of that similarity, by integrating over its gate."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    u, z = np.meshgrid(nodes, nodes)
    v = similarity * u + math.sqrt(1 - similarity**2) * z
    weight = np.outer(weights, weights) / weights.sum() ** 2
    return similarity * float((weight * u / (1 + np.exp(-u)) * v / (1 + np.exp(-v))).sum())


def test_gains_of_gate_and_up_are_averaged() -> None:
    block = model_of("spannorm", "fan_in", 1).blocks[0]
    assert isinstance(block, Block)
    with torch.no_grad():
        block.ffn.gate_proj.weight.mul_(3)
    assert read_gains(block).ffn_up == pytest.approx((9 + 1) / 2, rel=0.02)
    assert read_gains(block).ffn_down == pytest.approx(1, rel=0.02)


def test_scaled_branches_leave_a_finite_limit() -> None:
    num_layers = 500
    limits = {"postnorm": (-(1 + F) / 2, (CHI - F) / 2), "spannorm": (-F / 2, (CHI - F) / 2), "deepnorm": (0.0, 0.0)}
    for placement, (skip, full) in limits.items():
        first = alone(placement, num_layers, 1 / num_layers)[0]
        assert math.log(first.skip_gradient) == pytest.approx(skip, abs=0.03)
        assert math.log(first.hidden_gradient) == pytest.approx(full, abs=0.03)


def test_final_norm_weighs_gradients_by_position() -> None:
    # Flat attention adds 1 and 1/2 to the two positions in block 1; only the FFN, with gain 4, acts in block 2.
    blocks = [Gains(query=0, ffn_down=0), Gains(attn_out=0, ffn_down=4)]
    first = predict(SCHEMES["prenorm"](2), blocks, seq_len=2)[0]
    weights, factors = zip(*((1 / (k + 4 * F), 1 + 4 * CHI / k) for k in (2.0, 1.5)), strict=True)
    expected = sum(w * factor for w, factor in zip(weights, factors, strict=True)) / sum(weights)
    assert first.hidden_gradient == pytest.approx(math.sqrt(expected), rel=1e-4)


def test_prenorm_variance_is_as_predicted_at_every_depth() -> None:
    runs = [both("prenorm", "fan_in", 64, seed) for seed in range(3)]
    measured = np.mean([[signal.variance for signal in signals] for signals, _ in runs], axis=0)
    predicted = np.mean([[prediction.variance for prediction in predictions] for _, predictions in runs], axis=0)
    np.testing.assert_allclose(measured, predicted, rtol=0.1)


@pytest.mark.parametrize(
    ("placement", "init", "num_layers"),
    [
        ("prenorm", "fan_in", 128),
        ("prenorm", "default", 64),
        ("prenorm", "scale_init", 64),
        ("postnorm", "fan_in", 64),
        ("postnorm", "scale_init", 128),
        ("spannorm", "scale_init", 128),
        ("spannorm", "plain", 64),  # an embedding of variance 0.0004: without N0 attention would vanish in block 1
        ("deepnorm", "default", 64),
    ],
)
def test_forward_figures_and_scaled_gradients_are_as_predicted(placement: str, init: str, num_layers: int) -> None:
    signals, predictions = both(placement, init, num_layers)
    for field in ("variance", "attn_ratio", "ffn_ratio"):
        ratios = [getattr(s, field) / getattr(p, field) for s, p in zip(signals, predictions, strict=True)]
        assert math.exp(np.mean(np.log(ratios))) == pytest.approx(1, abs=0.1), field
        assert 0.5 < ratios[0] < 2, f"{field} in the first block"
    if init != "fan_in":
        measured = signals[0].hidden_gradient / signals[-1].hidden_gradient
        assert predictions[0].hidden_gradient == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("placement", ["postnorm", "spannorm"])
def test_explosion_has_the_predicted_rate(placement: str) -> None:
    signals, predictions = both(placement, "fan_in", 64)
    measured = math.log(signals[0].hidden_gradient / signals[-1].hidden_gradient)
    assert math.log(predictions[0].hidden_gradient) == pytest.approx(measured, rel=0.15)
    assert predictions[0].skip_gradient < 1e-3  # the skip path alone would vanish


def test_what_the_theory_does_not_cover_has_no_prediction() -> None:
    model = model_of("spannorm", "default", 2)
    assert predict_model(model, 8) is not None
    for change in ({"placement": "b2t"}, {"ffn": "moe"}, {"norm": "dyt"}, {"placement_options": {"first_norm": False}}):
        model.config = replace(model.config, **change)  # type: ignore[arg-type]
        assert predict_model(model, 8) is None
        model.config = replace(model.config, placement="spannorm", ffn="dense", norm="rmsnorm", placement_options={})


def test_repeated_tokens_start_out_similar() -> None:
    rare, often = (predict(SCHEMES["spannorm"](1), [Gains(attn_out=0, ffn_down=0)], 4, 2.0, r) for r in (0.0, 0.25))
    assert rare[0].cosine == 0
    assert often[0].cosine == pytest.approx(0.25)
