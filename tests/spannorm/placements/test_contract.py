"""What every placement promises, over dense and MoE, RMSNorm and LayerNorm."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from core.errors import ConfigError
from lightning_modules.initialization import initialize
from lightning_modules.transformer import Transformer
from lightning_modules.trunk import Block, Trunk
from spannorm import PLACEMENTS
from tests.support import reference
from tests.support.images import make_images_model
from tests.support.models import VOCAB_SIZE, tiny_config, tokens
from tests.support.placements import norms_of, through
from tests.support.schemes import (
    SCHEMES,
    At,
    Scheme,
    b2t_with_every_skip,
    bare,
    keel_eased,
    normed_sum,
)

HEADS, KV_HEADS, SEQ, THETA = 4, 2, 9, 10000.0
schemes = pytest.mark.parametrize("name", SCHEMES)
placements = pytest.mark.parametrize("name", PLACEMENTS)  # those without an equation in SCHEMES, too
ffns = pytest.mark.parametrize("ffn", ["dense", "moe"])
norms = pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])


def randomize(model: nn.Module) -> None:
    """Give it random gains, biases and gates, so that a norm in the wrong place shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.5, 1.5) if parameter.dim() == 1 else parameter.normal_(std=0.2)


def make_model(name: str, ffn: str, norm: str = "rmsnorm", num_layers: int = 4, **options: Any) -> Transformer:
    config = tiny_config(
        placement=name, placement_options=options, ffn=ffn, norm=norm, num_layers=num_layers, num_kv_heads=KV_HEADS
    )
    model = Transformer(config, VOCAB_SIZE)
    randomize(model)
    return model


def seen_by_equation(block: Block, scheme: Scheme, index: int, total: int, theta: float | None = THETA) -> At:
    """The block with attention as language has it: causal, with rotary positions; without theta as images have it."""
    attn, ffn = dict(block.attn.named_parameters()), dict(block.ffn.named_parameters())
    attn_norms, ffn_norms, norms = (norms_of(part) for part in (block.attn, block.ffn, block.placement))
    projection_norms = {letter: attn_norms[f"projection_norms.{letter}"] for letter in scheme.qkv.lower()}

    def same(x: Tensor) -> Tensor:
        return x

    def attention(x: Tensor) -> Tensor:
        inner = attn_norms["inner_norm"] if scheme.inner else same
        return reference.attention(
            x,
            attn,
            HEADS,
            KV_HEADS,
            theta,
            projection_norms,
            per_head=scheme.qkv.isupper(),
            inner=inner,
            causal=theta is not None,
        )

    def feed_forward(x: Tensor) -> Tensor:
        if "gate_proj.weight" in ffn:
            return reference.swiglu(x, ffn, ffn_norms["inner_norm"] if scheme.inner else same)
        return reference.moe(x, ffn, 4, 2, inner=ffn_norms["experts.mlp.inner_norm"] if scheme.inner else same)

    parameters = dict(block.placement.named_parameters())
    return At(index, total, attention, feed_forward, lambda n, x: norms[n](x), parameters.get("gate"), parameters)


def from_equations(model: Trunk, scheme: Scheme, h: Tensor, theta: float | None = THETA) -> Tensor:
    """What the head reads, for one sequence h [seq, dim]."""
    state: Any = h
    for index, block in enumerate(model.blocks, start=1):
        assert isinstance(block, Block)
        at = seen_by_equation(block, scheme, index, len(model.blocks), theta)
        state = scheme.equation(at, state)
    return scheme.leave(at, state)


def test_the_table_is_of_registered_placements_in_their_order() -> None:
    assert [name for name in PLACEMENTS if name in SCHEMES] == list(SCHEMES)


@norms
@ffns
@schemes
def test_the_stack_is_the_equation_and_calls_each_sublayer_once(name: str, ffn: str, norm: str) -> None:
    model = make_model(name, ffn, norm)
    calls: list[nn.Module] = []
    for block in model.blocks:
        for sublayer in (block.attn, block.ffn):
            sublayer.register_forward_hook(lambda module, inputs, output: calls.append(module))
    h = 3 * torch.randn(2, SEQ, 32)  # not of unit variance, so that a missing norm shows
    out = through(model, h)
    assert calls == [sublayer for block in model.blocks for sublayer in (block.attn, block.ffn)]
    assert not torch.isclose(out, h, rtol=1e-2).all(dim=-1).any()
    expected = torch.stack([from_equations(model, SCHEMES[name], sequence) for sequence in h])
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


@ffns
@schemes
def test_the_logits_of_images_are_the_equations_too(name: str, ffn: str) -> None:
    """From the pixels on: every patch sees all others and the class token, whose vector alone the classes come from."""
    model = make_images_model(placement=name, ffn=ffn, num_layers=4, num_kv_heads=KV_HEADS)
    randomize(model)
    images = 3 * torch.randn(2, 1, 8, 8)
    logits, _ = model(images)
    weights = dict(model.named_parameters())
    for image, found in zip(images, logits, strict=True):
        patches = [
            image[0, row : row + 2, column : column + 2].flatten() for row in (0, 2, 4, 6) for column in (0, 2, 4, 6)
        ]
        h = torch.stack([weights["class_token"], *(weights["embedding.weight"] @ patch for patch in patches)])
        out = from_equations(model, SCHEMES[name], h + weights["position"], theta=None)
        expected = weights["head.weight"] @ out[0]
        scale = max(1.0, float(expected.detach().abs().max()))
        torch.testing.assert_close(found, expected, atol=1e-4 * scale, rtol=1e-4)


@ffns
def test_keel_eases_its_first_block_in(ffn: str) -> None:
    model, h = make_model("keel", ffn, ease_in=True), 3 * torch.randn(SEQ, 32)
    expected = from_equations(model, SCHEMES["keel"]._replace(equation=keel_eased), h)
    torch.testing.assert_close(through(model, h[None])[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "as_published"),
    [
        ("b2t", {"last_skip": True}, {"equation": b2t_with_every_skip}),
        ("siamesenorm", {"normed_sum": True}, {"leave": normed_sum}),
        ("siamesenorm", {"head_norms": True}, {"qkv": "QKV"}),
        ("rezero", {"final_norm": False}, {"leave": bare}),
        ("hc", {"static": True}, {}),
    ],
    ids=["b2t", "siamesenorm, its sum", "siamesenorm, its heads", "rezero", "hc"],
)
@ffns
def test_what_the_authors_code_has_is_an_option(
    name: str, options: dict[str, Any], as_published: dict[str, Any], ffn: str
) -> None:
    model, h = make_model(name, ffn, **options), 3 * torch.randn(SEQ, 32)
    out = through(model, h[None])[0]
    expected = from_equations(model, SCHEMES[name]._replace(**as_published), h)
    largest = float(expected.detach().abs().max())  # without any norm a stream of experts grows to millions
    torch.testing.assert_close(out, expected, atol=1e-4 * max(1.0, largest), rtol=1e-4)
    assert not torch.allclose(out, through(make_model(name, ffn), h[None])[0], rtol=1e-2)


@norms
@ffns
@schemes
def test_it_has_the_declared_norms_and_default_and_moves_no_sublayer_weight(name: str, ffn: str, norm: str) -> None:
    scheme, model, plain = SCHEMES[name], make_model(name, ffn, norm), make_model("prenorm", ffn, norm)
    assert tuple(len(norms_of(block.placement)) for block in model.blocks) == scheme.norms
    assert PLACEMENTS[name].default_init == scheme.init
    own = {f"attn.projection_norms.{letter}" for letter in scheme.qkv.lower()}
    if scheme.inner:
        own |= {"attn.inner_norm", "ffn.inner_norm" if ffn == "dense" else "ffn.experts.mlp.inner_norm"}
    kinds = ("weight", "bias") if norm == "layernorm" else ("weight",)
    for block, other in zip(model.blocks, plain.blocks, strict=True):
        names = {key for key in block.state_dict() if not key.startswith("placement.")}
        expected = {key for key in other.state_dict() if not key.startswith("placement.")}
        assert names == expected | {f"{key}.{kind}" for key in own for kind in kinds}


@norms
@ffns
@placements
@pytest.mark.parametrize("of_images", [False, True], ids=["language", "images"])
def test_gradients_reach_every_parameter(name: str, ffn: str, norm: str, of_images: bool) -> None:
    if of_images:
        model: Trunk = make_images_model(placement=name, ffn=ffn, norm=norm, num_layers=4)
        randomize(model)
        logits, _ = model(torch.randn(4, 1, 8, 8))
    else:
        model = make_model(name, ffn, norm)
        logits, _ = model(tokens(4, SEQ))
    logits.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


QUICK = {
    ("spannorm", "moe", "rmsnorm"),
    ("siamesenorm", "dense", "rmsnorm"),
    ("prenorm", "dense", "layernorm"),
    ("mhc", "moe", "rmsnorm"),
    ("attnres", "dense", "rmsnorm"),
}
COMPILED = [
    pytest.param(name, ffn, norm, marks=() if (name, ffn, norm) in QUICK else pytest.mark.slow)  # seconds each
    for name in PLACEMENTS
    for ffn in ("dense", "moe")
    for norm in ("rmsnorm", "layernorm")
]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # read by the tracer itself
@pytest.mark.parametrize(("name", "ffn", "norm"), COMPILED)
def test_compiled_blocks_equal_eager_ones_with_no_graph_for_every_index(name: str, ffn: str, norm: str) -> None:
    torch._dynamo.reset()
    model, counter = make_model(name, ffn, norm).double(), CompileCounter()  # they add up in different orders
    h = torch.randn(2, SEQ, 32, dtype=torch.float64, requires_grad=True)
    expected = through(model, h)
    (gradient,) = torch.autograd.grad(expected.square().mean(), h)
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    out = through(model, h)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.square().mean(), h)[0], gradient)
    assert 2 <= counter.frame_count <= 3  # first block, those between, and the last; or attention and FFN


@pytest.mark.parametrize(
    ("name", "norm", "options"),
    [("attnres", "rmsnorm", {}), ("attnres", "gatednorm", {"group": 3}), ("prenorm", "derf", {"gpas": True})],
    ids=str,
)
def test_the_number_of_graphs_does_not_grow_with_depth(name: str, norm: str, options: dict[str, Any]) -> None:
    def graphs(num_layers: int) -> int:
        torch._dynamo.reset()
        model, counter = make_model(name, "dense", norm, num_layers, **options), CompileCounter()
        h = torch.randn(2, SEQ, 32)
        with torch.no_grad():
            expected = through(model, h)
            for block in model.blocks:
                block.compile(backend=counter, fullgraph=True)
            torch.testing.assert_close(through(model, h), expected)
        return counter.frame_count

    assert graphs(4) == graphs(7)


@pytest.mark.parametrize(("name", "norm"), [(name, norm) for name in PLACEMENTS for norm in PLACEMENTS[name].norms])
@ffns
def test_bf16_autocast_stays_finite_and_close(ffn: str, name: str, norm: str) -> None:
    model = make_model(name, ffn, norm)
    initialize(model)
    sequence = tokens(2, SEQ)
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = model(sequence)
        loss = logits.float().square().mean()
    loss.backward()
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)
    exact = model(sequence)[0]
    if norm == "rmsnorm":
        assert (logits.float() - exact).square().mean() < 0.05 * exact.square().mean()


@pytest.mark.parametrize("norm", ["dyt", "derf", "none"])
@ffns
@schemes
def test_norms_without_statistics_work_or_are_refused(name: str, ffn: str, norm: str) -> None:
    if norm in SCHEMES[name].refuses:
        with pytest.raises(ConfigError) as error:
            make_model(name, ffn, norm)
        assert (error.value.field, error.value.value) == ("model.norm", norm)
        assert f"under {PLACEMENTS[name].__name__}" in error.value.valid
        assert norm not in error.value.valid
        return
    model = make_model(name, ffn, norm)
    initialize(model)
    out = model(tokens(2, SEQ))[0]
    out.square().mean().backward()
    assert torch.isfinite(out).all()
    if norm == "none":
        others = re.compile(r"gate$|map_\w+\.(scale|bias)$")  # scalars and biases that are no norm's
        vectors = [key for key, parameter in model.named_parameters() if parameter.dim() == 1]
        assert [key for key in vectors if not others.search(key)] == []


@pytest.mark.parametrize("final_norm", [False, True])
@schemes
def test_the_final_norm_can_be_switched(name: str, final_norm: bool) -> None:
    model = make_model(name, "dense", final_norm=final_norm)
    assert sum("final_norm" in key for key, _ in model.named_parameters()) == final_norm


@pytest.mark.parametrize(
    ("name", "options", "valid"),
    [
        ("keel", {"alpha": 0.0}, "a number > 0, 2L or sqrt"),
        ("keel", {"alpha": float("inf")}, "a number > 0, 2L or sqrt"),
        ("keel", {"alpha": "4L"}, "'2L', 'sqrt'"),
        ("mixln", {"post_fraction": 1.5}, "a number in [0, 1]"),
        ("prenorm", {"alpha": 2.0}, "one of final_norm, gpas"),
        ("hc", {"streams": 1}, "an integer from 2 to 64"),
        ("ihc", {"streams": 2.5}, "an integer"),
        ("hc", {"scale": 0.0}, "a number > 0"),
        ("mhc", {"std": 0.0}, "a number > 0"),
        ("mhc", {"start": "zero"}, "'identity', 'uniform'"),
        ("mhc", {"iterations": 0}, "an integer from 1 to 1000"),
        ("gr", {"rank": 0}, "null, or an integer from 1 to 128"),
        ("attnres", {"group": 0}, "an integer >= 1"),
        ("attnres", {"group": 1.5}, "an integer"),
    ],
)
def test_options_outside_their_range_are_refused(name: str, options: dict[str, Any], valid: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_model(name, "dense", **options)
    assert error.value.field == f"model.placement_options.{next(iter(options))}"
    assert valid in error.value.valid
