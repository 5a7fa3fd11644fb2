"""Each norm kind against its formula."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import ConfigError
from lightning_modules.initialization import initialize
from lightning_modules.layers.norms import make_norm
from lightning_modules.transformer import Transformer
from spannorm import DyT, GatedNorm, NormFactory
from tests.support.models import VOCAB_SIZE, tiny_config, tokens

EPS = 0.1  # large enough to show


def formula(kind: str, x: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    if kind == "rmsnorm":
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS) * p["weight"]
    if kind == "layernorm":
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPS) * p["weight"] + p["bias"]
    if kind == "dyt":
        return p["weight"] * np.tanh(p["alpha"] * x) + p["bias"]
    if kind == "derf":
        return p["weight"] * np.vectorize(math.erf)(p["alpha"] * x + p["shift"]) + p["bias"]
    return x


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm", "dyt", "derf", "gatednorm"])
@pytest.mark.parametrize("cpu_kernels", ["auto", "off"])
def test_a_narrower_gain_takes_nothing_from_a_wider_input(kind: str, cpu_kernels: str) -> None:
    """As weights that FSDP2 gathers in bf16: the stream stays what it is, and so do its gradients."""
    norm = make_norm(tiny_config(norm=kind, cpu_kernels=cpu_kernels), dim=12).to(torch.bfloat16)
    wide = copy.deepcopy(norm).float()
    x = torch.randn(3, 5, 12, requires_grad=True)
    found, expected = norm(x), wide(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad(out.square().sum(), x)[0] for out in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm", "dyt", "derf", "none"])
def test_norm_is_its_formula(kind: str) -> None:
    norm = make_norm(tiny_config(norm=kind, norm_eps=EPS), dim=12)
    x = 2 * torch.randn(3, 5, 12) + 1
    for randomized in (False, True):
        if randomized:
            for parameter in norm.parameters():
                torch.nn.init.normal_(parameter)
        parameters = {name: parameter.detach().numpy() for name, parameter in norm.named_parameters()}
        expected = formula(kind, x.numpy(), parameters)
        np.testing.assert_allclose(norm(x).detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(("kind", "start"), [("rmsnorm", {"weight": 1}), ("layernorm", {"weight": 1, "bias": 0})])
def test_gains_start_at_one_and_biases_at_zero(kind: str, start: dict[str, float]) -> None:
    norm = make_norm(tiny_config(norm=kind), dim=12)
    assert {name: set(parameter.tolist()) for name, parameter in norm.named_parameters()} == {
        name: {value} for name, value in start.items()
    }


def alphas(**overrides: Any) -> dict[str, float]:
    """Where dyt's a starts, by the names of the norms in a model of two prenorm blocks."""
    model = Transformer(tiny_config(norm="dyt", **overrides), VOCAB_SIZE)
    return {name: norm.alpha.item() for name, norm in model.named_modules() if isinstance(norm, DyT)}


@pytest.mark.parametrize(
    ("width", "attention", "elsewhere"),
    [(12, 1.0, 1.0), (1024, 1.0, 1.0), (2000, 1.0, 0.5), (4096, 0.8, 0.2), (5120, 0.6, 0.15), (20000, 0.2, 0.05)],
)
def test_dyt_starts_as_steep_as_its_authors_have_it_at_that_width(
    width: int, attention: float, elsewhere: float
) -> None:
    make = NormFactory("dyt", 8, EPS, width=width)
    x = torch.randn(4, 8)
    torch.testing.assert_close(make()(x), torch.tanh(elsewhere * x))
    torch.testing.assert_close(make(before_attention=True)(x), torch.tanh(attention * x))


@pytest.mark.parametrize(
    ("placement", "before_attention"),
    [
        ("prenorm", ["0.placement.norm_attn", "1.placement.norm_attn"]),
        ("sandwich", ["0.placement.norm_attn_in", "1.placement.norm_attn_in"]),
        ("spannorm", ["0.placement.first_norm"]),
        ("hybridnorm_star", ["0.placement.norm_attn"]),
        ("siamesenorm", ["0.placement.norms_attn.in", "1.placement.norms_attn.in"]),
        ("hc", ["0.placement.norm_attn", "1.placement.norm_attn"]),
        ("attnres", ["0.placement.norm_attn", "1.placement.norm_attn"]),
        ("gr", [f"{block}.placement.map_attn.norms.{stream}" for block in (0, 1) for stream in range(4)]),
        ("postnorm", []),  # attention reads the stream, and so do others
    ],
)
def test_dyt_is_told_where_attention_alone_reads(placement: str, before_attention: list[str]) -> None:
    found = alphas(placement=placement, norm_options={"alpha": 0.3, "alpha_attention": 0.7})
    assert {name for name, alpha in found.items() if alpha == pytest.approx(0.7)} == {
        f"blocks.{name}" for name in before_attention
    }
    assert {round(alpha, 6) for alpha in found.values()} <= {0.3, 0.7}


@pytest.mark.parametrize("kind", ["dyt", "derf"])
@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({}, 50.0),  # the embedding is drawn with 0.02
        ({"embedding_scale": "sqrt"}, 32**0.5),
        ({"embedding_scale": 3}, 3.0),
        ({"embedding_scale": None}, None),
    ],
)
def test_pointwise_kinds_scale_the_embedding_by_one_learned_number(
    kind: str, options: dict[str, Any], start: float | None
) -> None:
    model = Transformer(tiny_config(norm=kind, placement="rezero", norm_options=options), VOCAB_SIZE)
    initialize(model)
    sequence = tokens(2, 5)
    final = model.blocks[-1].placement.final_norm
    torch.testing.assert_close(  # closed gates: the blocks are the identity
        model(sequence)[0], model.head(final(model.embedding(sequence) * (1 if start is None else start)))
    )
    scales = [name for name, _ in model.named_parameters() if "embedding_scale" in name]
    assert len(scales) == (start is not None)
    assert [name for name, _ in Transformer(tiny_config(), VOCAB_SIZE).named_parameters() if "scale" in name] == []


@pytest.mark.parametrize(
    ("kind", "options", "field", "valid"),
    [
        ("dyt", {"alpha": 0.0}, "alpha", "a number > 0, or null"),
        ("dyt", {"alpha_attention": -1.0}, "alpha_attention", "a number > 0, or null"),
        ("dyt", {"alpha": float("inf")}, "alpha", "a number > 0, or null"),
        ("dyt", {"embedding_scale": 0.0}, "embedding_scale", "a number > 0, unit, sqrt or null"),
        ("dyt", {"embedding_scale": "root"}, "embedding_scale", "'sqrt'"),
        ("dyt", {"beta": 1.0}, "beta", "one of alpha, alpha_attention, embedding_scale"),
        ("dyt", {"width": 1}, "width", "no such field"),
        ("derf", {"alpha": 0.0}, "alpha", "a number > 0"),
        ("derf", {"shift": float("nan")}, "shift", "a finite number"),
        ("derf", {"embedding_scale": -1}, "embedding_scale", "a number > 0, unit, sqrt or null"),
        ("derf", {"alpha_attention": 1.0}, "alpha_attention", "one of alpha, embedding_scale, shift"),
        ("gatednorm", {"kind": "gatednorm"}, "kind", "one of derf, dyt, layernorm, none, rmsnorm"),
        ("gatednorm", {"kind": "my_file.MyNorm"}, "kind", "one of derf, dyt, layernorm, none, rmsnorm"),
        ("gatednorm", {"rank": 0}, "rank", "an integer >= 1"),
        ("gatednorm", {"up_std": -0.1}, "up_std", "a number >= 0"),
        ("gatednorm", {"kind": "dyt", "kind_options": {"alpha": 0.0}}, "kind_options.alpha", "a number > 0, or null"),
        ("gatednorm", {"kind": "derf", "kind_options": {"alpha": -1.0}}, "kind_options.alpha", "a number > 0"),
        ("gatednorm", {"kind": "derf", "kind_options": {"alpha": "x"}}, "kind_options.alpha", "a number"),
        (
            "gatednorm",
            {"kind": "derf", "kind_options": {"embedding_scale": -1}},
            "kind_options.embedding_scale",
            "a number > 0, unit, sqrt or null",
        ),
        ("gatednorm", {"kind": "derf", "kind_options": {"width": 1}}, "kind_options.width", "no such field"),
        ("gatednorm", {"kind": "derf", "kind_options": {"apha": 1.0}}, "kind_options.apha", "did you mean alpha"),
        ("gatednorm", {"kind_options": {"alpha": 0.5}}, "kind_options.alpha", "no such field"),
        ("gatednorm", {"kind": 3}, "kind", "text"),
        ("rmsnorm", {"alpha": 1.0}, "alpha", "no such field"),
        ("none", {"alpha": 1.0}, "alpha", "no such field"),
    ],
)
def test_options_of_norms_outside_their_range_are_refused(
    kind: str, options: dict[str, Any], field: str, valid: str
) -> None:
    with pytest.raises(ConfigError) as error:
        Transformer(tiny_config(norm=kind, norm_options=options), VOCAB_SIZE)
    assert error.value.field == f"model.norm_options.{field}"
    assert valid in error.value.valid


@pytest.mark.parametrize(
    "overrides",
    [
        {"dim": 2, "num_heads": 1, "norm": "layernorm"},
        {"dim": 8, "num_heads": 4, "norm": "layernorm", "placement": "hybridnorm"},  # over one head
        {"ffn_dim": 1, "placement": "subln"},  # over the hidden layer
        {"ffn_dim": 2, "norm": "layernorm", "placement": "subln"},
    ],
    ids=str,
)
def test_a_norm_that_leaves_nothing_but_a_sign_is_refused(overrides: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"model\.norm=.* over \d nothing but a sign is left"):
        Transformer(tiny_config(**overrides), VOCAB_SIZE)


def test_derf_starts_where_its_reimplementations_have_it() -> None:
    norm, x = NormFactory("derf", 8)(), torch.randn(4, 8)
    torch.testing.assert_close(norm(x), torch.erf(x / 2))
    assert {name: set(value.tolist()) for name, value in norm.named_parameters()} == {
        **{"alpha": {0.5}, "shift": {0.0}},
        **{"weight": {1.0}, "bias": {0.0}},
    }


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm", "dyt", "derf", "none"])
def test_gatednorm_is_any_kind_times_a_gate_of_low_rank(kind: str) -> None:
    """And what of it is a gradient, by differences."""
    norm = NormFactory("gatednorm", 5, EPS, {"kind": kind, "rank": 3})().double()
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    parameters = {name.removeprefix("norm."): value.detach().numpy() for name, value in norm.named_parameters()}
    y = formula(kind, x.detach().numpy(), parameters)
    hidden = y @ parameters["down"].T
    gate = 1 / (1 + np.exp(-(hidden / (1 + np.exp(-hidden))) @ parameters["up"].T))
    np.testing.assert_allclose(norm(x).detach().numpy(), y * gate, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(norm.gates(x).detach().numpy(), gate, rtol=1e-10, atol=1e-10)
    names = [name for name, _ in norm.named_parameters()]
    values = tuple(norm.parameters())
    of = lambda x, *values: torch.func.functional_call(norm, dict(zip(names, values, strict=True)), x)  # noqa: E731
    assert torch.autograd.gradcheck(of, (x, *values))


@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_gatednorm_starts_half_open_and_its_matrices_have_a_role(ffn: str) -> None:
    model = Transformer(tiny_config(norm="gatednorm", placement="subln", ffn=ffn), VOCAB_SIZE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    initialize(model)
    owned = [matrix for matrix in model.matrices() if matrix.role == "residual"]
    norms = [module for module in model.modules() if isinstance(module, GatedNorm)]
    assert {matrix.weight for matrix in owned} == {weight for norm in norms for weight in (norm.down, norm.up)}
    for norm in norms:
        dim = norm.down.size(1)
        assert (tuple(norm.down.shape), tuple(norm.up.shape)) == ((16, dim), (dim, 16))
        assert norm.down.std().item() == pytest.approx(dim**-0.5, rel=0.2)
        assert not norm.up.any()
        assert norm.gates(torch.randn(2, dim)).eq(0.5).all()
    model = Transformer(tiny_config(norm="gatednorm", norm_options={"up_std": 0.5}), VOCAB_SIZE)
    initialize(model)
    assert model.blocks[0].placement.norm_attn.up.std().item() == pytest.approx(0.5, rel=0.2)


def test_a_gated_kind_is_refused_where_that_kind_is() -> None:
    Transformer(tiny_config(norm="gatednorm", placement="deepnorm"), VOCAB_SIZE)
    with pytest.raises(ConfigError, match=r"model\.norm_options\.kind='dyt' is not valid: .* under DeepNorm"):
        Transformer(tiny_config(norm="gatednorm", norm_options={"kind": "dyt"}, placement="deepnorm"), VOCAB_SIZE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"placement": "attnres", "norm_options": {"kind": "none"}}, "model.norm_options.kind='none' .* under AttnRes"),
        (
            {"ffn_dim": 2, "placement": "subln", "norm_options": {"kind": "layernorm"}},
            "model.norm_options.kind='layernorm' .* nothing but a sign",
        ),
    ],
)
def test_what_a_gated_kind_cannot_be_names_the_option(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Transformer(tiny_config(norm="gatednorm", **overrides), VOCAB_SIZE)


def test_a_gated_dyt_scales_the_embedding_as_dyt_does() -> None:
    options = {"kind": "dyt", "kind_options": {"embedding_scale": 3.0}}
    model = Transformer(tiny_config(norm="gatednorm", norm_options=options), VOCAB_SIZE)
    assert model.blocks[0].embedding_scale.weight.item() == 3.0


def test_the_gate_is_computed_in_fp32() -> None:
    norm = make_norm(tiny_config(norm="gatednorm"), dim=32)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out, gates = norm(x), norm.gates(x)
    assert (out.dtype, gates.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out, (norm.norm(x).float() * norm.gates(x)).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16 input", "fp32 input"])
def test_gates_are_no_narrower_than_what_they_are_made_of(stored: torch.dtype, dtype: torch.dtype) -> None:
    norm = NormFactory("gatednorm", 32, options={"kind": "none"})()
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    norm, x = norm.to(stored), torch.randn(4, 32).to(dtype)
    exact = copy.deepcopy(norm).double().gates(x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=stored == torch.float32):
        gates, out = norm.gates(x), norm(x)
    assert (gates.dtype, out.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(gates.double(), exact, atol=1e-6, rtol=1e-5)


def test_unknown_kind() -> None:
    with pytest.raises(
        ConfigError, match=r"model\.norm='rmsnrm'.*derf, dyt, gatednorm, layernorm, none, rmsnorm.*mean rmsnorm"
    ):
        make_norm(tiny_config(norm="rmsnrm"), dim=12)


@pytest.mark.parametrize("kind", ["rmsnorm", "dyt", "derf", "none"])  # layernorm's result is autocast's to choose
def test_bf16_stays_bf16_and_is_computed_in_fp32(kind: str) -> None:
    norm, x = make_norm(tiny_config(norm=kind), dim=12), torch.randn(4, 12, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    torch.testing.assert_close(out, norm(x.float()).bfloat16(), rtol=0, atol=0)
