"""Standard deviations measured on drawn weights, against numbers worked out by hand for one geometry."""

from typing import Any

import pytest
import torch

from core.errors import ConfigError
from lightning_modules.initialization import initialize, resolve_init
from lightning_modules.transformer import Transformer
from spannorm import (
    InvalidArgument,
    b2t_init,
    deepnorm_init,
    deepscalelm_init,
    megatron_init,
    scale_init,
    subln_init,
)
from tests.support.models import tiny_config

OF_DEPTH = [megatron_init, scale_init, deepnorm_init, b2t_init, subln_init, deepscalelm_init]

# dim 256: 1/sqrt(256) = 0.0625. FFN 1024: 1/sqrt(1024) = 0.03125. 4 blocks: 1/sqrt(4) = 0.5, 1/sqrt(8) = 0.35355.
# Xavier: sqrt(2 / 512) = 0.0625, with the 128 of two key and value heads sqrt(2 / 384) = 0.072169, FFN sqrt(2 / 1280).
GEOMETRY: dict[str, Any] = {"dim": 256, "num_layers": 4, "num_kv_heads": 2, "ffn_dim": 1024}
VOCAB_SIZE = 512
DENSE = {
    "embedding.weight": "embedding",
    "head.weight": "head",
    "attn.q_proj.weight": "query",
    "attn.k_proj.weight": "key",
    "attn.v_proj.weight": "value",
    "attn.o_proj.weight": "attn_out",
    "ffn.gate_proj.weight": "ffn_up",
    "ffn.up_proj.weight": "ffn_up",
    "ffn.down_proj.weight": "ffn_down",
}
MOE = {
    "ffn.router.layer.weight": "router",
    "ffn.experts.mlp.w1": "ffn_up",
    "ffn.experts.mlp.v1": "ffn_up",
    "ffn.experts.mlp.w2": "ffn_down",
}
SHARED = {
    "shared_expert.gate_proj.weight": "ffn_up",
    "shared_expert.up_proj.weight": "ffn_up",
    "shared_expert.down_proj.weight": "shared_down",
}
PLAIN = dict.fromkeys(DENSE.values(), 0.02)
FAN_IN = dict.fromkeys(DENSE.values(), 0.0625) | {"embedding": 1.0, "ffn_down": 0.03125}
MEGATRON = PLAIN | {"attn_out": 0.0070711, "ffn_down": 0.0070711}
SCALE_INIT = FAN_IN | {"attn_out": 0.03125, "ffn_down": 0.015625}
XAVIER = FAN_IN | {"key": 0.072169, "value": 0.072169, "ffn_up": 0.039528, "ffn_down": 0.039528}
# x 32^(-1/4) = 0.42045
DEEPNORM = XAVIER | {"value": 0.030343, "attn_out": 0.026278, "ffn_up": 0.016620, "ffn_down": 0.016620}
B2T = {role: std / (1 if role in ("embedding", "head") else 2) for role, std in XAVIER.items()}
# sqrt(2 / (256 + 256)) / sqrt(2), sqrt(2 / (256 + 128)) / sqrt(2), 1 / sqrt(3 x 256), 1 / sqrt(3 x 1024); x 1 / 2
FAIRSEQ = {"query": 0.022097, "key": 0.025516, "value": 0.025516, "ffn_up": 0.018042, "ffn_down": 0.009021}
MEGATRON_OF_HYBRIDNORM = dict.fromkeys(PLAIN, 0.039528) | {"attn_out": 0.013975, "ffn_down": 0.013975}
# x sqrt(ln 8) = 1.44203
SUBLN = XAVIER | {"value": 0.104069, "attn_out": 0.090127, "ffn_up": 0.057001, "ffn_down": 0.057001}
# x sqrt(2 / 4) = 0.70711; the down matrix x 1/sqrt(E silu(z)^2) = 1.67654 too
DEEPSCALELM = FAN_IN | {"attn_out": 0.044194, "ffn_down": 0.037047}


def drawn(**overrides: Any) -> dict[str, torch.Tensor]:
    model = Transformer(tiny_config(**GEOMETRY, **overrides), VOCAB_SIZE)
    initialize(model)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_stds(weights: dict[str, torch.Tensor], expected: dict[str, float]) -> None:
    checked = 0
    for name, weight in weights.items():
        role = next((role for suffix, role in (DENSE | MOE | SHARED).items() if name.endswith(suffix)), None)
        if role is None:
            assert (weight == 1).all(), f"{name} is a norm gain"
            continue
        # 5 standard errors: below 2 % for every matrix but the router.
        tolerance = 5 / (2 * weight.numel()) ** 0.5
        assert weight.std().item() == pytest.approx(expected[role], rel=tolerance), name
        assert abs(weight.mean().item()) < 5 * expected[role] / weight.numel() ** 0.5, name
        checked += 1
    names = " ".join(weights)
    assert checked == 2 + 4 * (7 + ("router" in names) + 3 * ("shared" in names))


@pytest.mark.parametrize(
    ("init", "options", "expected"),
    [
        ("plain", {}, PLAIN),
        ("plain", {"std": 0.5}, dict.fromkeys(PLAIN, 0.5)),
        ("fan_in", {}, FAN_IN),
        ("megatron", {}, MEGATRON),
        ("megatron", {"std": 0.04}, {role: 2 * std for role, std in MEGATRON.items()}),
        # sqrt(2 / (5 x 256)) = 0.039528, and that / sqrt(8)
        ("megatron", {"std": None}, MEGATRON_OF_HYBRIDNORM),
        ("scale_init", {}, SCALE_INIT),
        ("scale_init", {"factor": "sublayers"}, FAN_IN | {"attn_out": 0.022097, "ffn_down": 0.011049}),
        ("scale_init", {"targets": ["value", "ffn_up"]}, FAN_IN | {"value": 0.03125, "ffn_up": 0.03125}),
        ("scale_init", {"targets": []}, FAN_IN),
        ("deepnorm", {}, DEEPNORM),
        ("b2t", {}, B2T),
        ("subln", {}, SUBLN),
        ("deepscalelm", {}, DEEPSCALELM),
        ("plain", {"embedding_std": 0.632}, PLAIN | {"embedding": 0.632}),
        ("megatron", {"std": None, "head": "fan_in"}, MEGATRON_OF_HYBRIDNORM | {"head": 0.0625}),
        ("b2t", {"base": "fairseq"}, B2T | FAIRSEQ),
        # 0.25^(-1/4) = 1.41421 on values and outputs
        ("deepscalelm", {"correlation": 0.25}, DEEPSCALELM | {"value": 0.088388, "attn_out": 0.0625}),
    ],
)
def test_every_matrix_has_the_standard_deviation_of_its_init(
    init: str, options: dict[str, Any], expected: dict[str, float]
) -> None:
    assert_stds(drawn(init=init, init_options=options), expected)


@pytest.mark.parametrize(
    ("init", "expected", "shared_down"),
    [
        ("plain", PLAIN, {1: 0.02, 2: 0.02}),
        # Two shared experts are one FFN of twice the width: 1/sqrt(2048) x 0.5.
        ("scale_init", SCALE_INIT, {1: 0.015625, 2: 0.011049}),
    ],
)
@pytest.mark.parametrize("num_shared", [0, 1, 2])
def test_experts_draw_like_a_dense_ffn_and_the_router_with_0_02(
    init: str, expected: dict[str, float], shared_down: dict[int, float], num_shared: int
) -> None:
    moe = {"expert_dim": 1024, "num_experts": 4, "num_shared_experts": num_shared}
    weights = drawn(init=init, ffn="moe", moe=moe)
    assert_stds(weights, expected | {"router": 0.02, "shared_down": shared_down.get(num_shared, 0.0)})
    assert any("shared" in name for name in weights) == (num_shared > 0)


@pytest.mark.parametrize(
    ("placement", "options", "expected"),
    [
        ("prenorm", {}, MEGATRON),
        ("postnorm", {}, PLAIN),
        ("spannorm", {}, SCALE_INIT),
        ("spannorm", {"targets": ["ffn_down"]}, FAN_IN | {"ffn_down": 0.015625}),
    ],
)
def test_default_is_what_the_placement_names(
    placement: str, options: dict[str, Any], expected: dict[str, float]
) -> None:
    assert_stds(drawn(placement=placement, init="default", init_options=options), expected)


def test_tied_embeddings_draw_as_the_head_that_they_also_are() -> None:
    weights = drawn(init="fan_in", tie_embeddings=True)
    assert "head.weight" not in weights
    assert weights["embedding.weight"].std().item() == pytest.approx(0.0625, rel=0.02)


def test_truncated_draws_stay_within_so_many_standard_deviations() -> None:
    whole, cut = drawn(init="plain"), drawn(init="plain", init_truncation=2)
    assert whole["head.weight"].abs().max() > 4 * 0.02
    for name, weight in cut.items():
        if weight.dim() == 2:
            assert 1.99 * 0.02 < weight.abs().max() <= 2 * 0.02, name
            # of a normal distribution cut off at 2, sqrt(1 - 4 phi(2) / (2 Phi(2) - 1)) = 0.87963
            assert weight.std().item() == pytest.approx(0.02 * 0.87963, rel=0.02), name


def test_the_seed_decides() -> None:
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return drawn()["head.weight"]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize(
    ("overrides", "field", "valid"),
    [
        ({"init": "plian"}, "model.init", "(did you mean plain?)"),
        (
            {"init": "plain", "init_options": {"sdt": 1.0}},
            "model.init_options.sdt",
            "one of embedding_std, std (did you mean std?)",
        ),
        ({"init": "plain", "init_options": {"std": "big"}}, "model.init_options.std", "a number"),
        ({"init": "fan_in", "init_options": {"num_layers": 3}}, "model.init_options.num_layers", "no such field"),
        (
            {"init": "scale_init", "init_options": {"factor": "layers"}},
            "model.init_options.factor",
            "one of 'blocks', 'sublayers'",
        ),
        (
            {"init": "scale_init", "init_options": {"targets": ["key"]}},
            "model.init_options.targets",
            "a list of attn_out, value, ffn_up, ffn_down",
        ),
        (
            {"init": "deepscalelm", "init_options": {"correlation": 0.0}},
            "model.init_options.correlation",
            "a number in (0, 1]",
        ),
    ],
)
def test_what_does_not_exist_is_refused_with_the_choices(overrides: dict[str, Any], field: str, valid: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_init(tiny_config(**overrides))
    assert error.value.field == field
    assert valid in error.value.valid


@pytest.mark.parametrize(
    ("make", "arguments", "valid"),
    [
        *((make, {"num_layers": 0}, "num_layers=0 is not valid: expected an integer >= 1") for make in OF_DEPTH),
        (
            scale_init,
            {"num_layers": 4, "factor": "layers"},
            "factor='layers' is not valid: expected one of blocks, sub",
        ),
        (megatron_init, {"num_layers": 4, "head": "xavier"}, "head='xavier' is not valid: expected one of std, fan_in"),
        (b2t_init, {"num_layers": 4, "base": "torch"}, "base='torch' is not valid: expected one of xavier, fairseq"),
    ],
)
def test_the_library_alone_refuses_it_too(make: Any, arguments: dict[str, Any], valid: str) -> None:
    """A model of one's own has no configuration that would do so before."""
    with pytest.raises(InvalidArgument, match=f"^{valid}"):
        make(**arguments)


@pytest.mark.parametrize("std", [-1.0, 0.0, float("inf"), float("nan")])
def test_a_standard_deviation_that_is_none_is_refused(std: float) -> None:
    with pytest.raises(ConfigError, match=r"model\.init_options"):
        initialize(Transformer(tiny_config(init="plain", init_options={"std": std}), VOCAB_SIZE))
