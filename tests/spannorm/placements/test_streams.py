"""The schemes with many streams: their equations to the last digit, their start, gradients and precision."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.initialization import initialize
from lightning_modules.transformer import Transformer
from spannorm import PLACEMENTS, Depth, ManyStreams, Mapping, NormFactory
from spannorm.placements.constrained_mapping import ConstrainedMapping
from spannorm.placements.sinkhorn import _sinkhorn, _sinkhorn_gradient, sinkhorn
from spannorm.placements.streams import project, read, write
from tests.support.models import VOCAB_SIZE, tiny_config, tokens
from tests.support.operators import opcheck
from tests.support.placements import norms_of, through
from tests.support.schemes import EPS, SCHEMES, At, sinkhorn_knopp

SEQ = 9
NAMES = [name for name, scheme in PLACEMENTS.items() if issubclass(scheme, ManyStreams)]
VARIANTS: list[tuple[str, dict[str, Any]]] = [*((name, {}) for name in NAMES), ("hc", {"static": True})]
each = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=[*NAMES, "hc, static"])
OF_OTHER_SIZES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("hc", {"streams": 3}, {"n": 3}),
    ("hc", {"streams": 2, "static": True}, {"n": 2}),
    ("mhc", {"streams": 3, "iterations": 2, "start": "uniform"}, {"n": 3, "iterations": 2}),
    ("ihc", {"streams": 5}, {"n": 5}),
    ("gr", {"streams": 3, "rank": 5}, {"n": 3}),
]
"""Schemes with other options than the defaults, and what their equations are told of it."""
of_names = pytest.mark.parametrize("name", NAMES)


def test_these_are_the_schemes_with_many_streams() -> None:
    assert NAMES == ["hc", "mhc", "ihc", "gr"]


@pytest.mark.parametrize(
    ("name", "options", "told"), [*((name, options, {}) for name, options in VARIANTS), *OF_OTHER_SIZES], ids=str
)
def test_the_stack_is_the_equation_in_double_precision(
    name: str, options: dict[str, Any], told: dict[str, Any]
) -> None:
    """With sublayers that are as exact: attention's rotary tables are in fp32. Each is called once."""
    equation = partial(SCHEMES[name].equation, **told)
    weights = 0.3 * torch.randn(2, 16, 16, dtype=torch.float64)
    calls: list[int] = []

    def sublayer(which: int) -> Callable[[Tensor], Tensor]:
        return lambda x: calls.append(which) or torch.tanh(x @ weights[which])  # type: ignore[func-returns-value]

    norm, state = NormFactory("rmsnorm", 16, EPS), 3 * torch.randn(2, 5, 16, dtype=torch.float64)
    expected: Any = list(state)
    for index in range(1, 5):
        placement = PLACEMENTS[name](Depth(index, 4), norm, **options).double()
        for parameter in placement.parameters():
            nn.init.uniform_(parameter, -1.0, 1.0)
        state = placement.enter(state) if index == 1 else state
        state = placement(state, sublayer(0), sublayer(1))
        norms, parameters = norms_of(placement), dict(placement.named_parameters())
        assert calls == [0, 1]
        at = At(index, 4, sublayer(0), sublayer(1), lambda n, x, norms=norms: norms[n](x), None, parameters)
        expected = [equation(at, sequence) for sequence in expected]
        calls.clear()
        torch.testing.assert_close(state, torch.stack(expected), atol=1e-10, rtol=1e-10)
    out = torch.stack([SCHEMES[name].leave(at, sequence) for sequence in expected])
    torch.testing.assert_close(placement.leave(state), out, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_sinkhorn_divides_columns_then_rows(scale: float) -> None:
    logits = scale * torch.randn(5, 5, 7, dtype=torch.float64)
    for iterations in (1, 20):
        found = sinkhorn(logits, iterations)
        expected = torch.stack([sinkhorn_knopp(logits[..., k], iterations) for k in range(7)], -1)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-9)
        torch.testing.assert_close(found.sum(1), torch.ones(5, 7, dtype=torch.float64), atol=1e-14, rtol=0)
    converged = sinkhorn(0.3 * logits / scale, 200)
    torch.testing.assert_close(converged.sum(0), torch.ones(5, 7, dtype=torch.float64), atol=1e-12, rtol=0)


def test_sinkhorn_stays_finite_where_exponentials_do_not() -> None:
    logits = torch.tensor([[0.0, 1e4], [0.0, 0.0]]).unsqueeze(-1).requires_grad_()
    found = sinkhorn(logits, 20)
    found[0, 0].sum().backward()
    assert bool(found.isfinite().all())
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
    torch.testing.assert_close(found.sum(1), torch.ones(2, 1))


def test_sinkhorn_is_an_operator_as_torch_wants_one() -> None:
    """Whatever the strides: what torch.compile is told of its outputs holds."""
    for logits in (torch.randn(3, 3, 5), torch.randn(5, 3, 3).permute(1, 2, 0)):
        opcheck(_sinkhorn, (logits.requires_grad_(), 3))
        opcheck(_sinkhorn_gradient, (torch.randn(5, 3, 3).permute(1, 2, 0), logits.detach(), 3))


def test_every_function_has_first_and_second_gradients() -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    rows, n, dim = 3, 3, 5
    streams, y = random(rows, n, dim), random(rows, dim)
    cases: list[tuple[Any, tuple[Tensor, ...]]] = [
        (lambda s, w: project(s, w, 1e-3), (streams, random(4, n * dim))),
        (lambda s, w: project(s, w, 1e-3), (streams, random(4, dim))),  # each stream by itself
        (read, (streams, random(rows, n))),
        (write, (streams, random(rows, n, n), random(rows, n), y)),
        (lambda s, post, out: write(s, None, post, out), (streams, random(rows, n), y)),
        (lambda logits: sinkhorn(logits, 4), (random(n, n, rows),)),
    ]
    for function, inputs in cases:
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@each
def test_a_block_has_the_gradients_of_its_finite_differences(name: str, options: dict[str, Any]) -> None:
    placement = PLACEMENTS[name](Depth(1, 2), NormFactory("rmsnorm", 4, 1e-3), streams=3, **options).double()
    for parameter in placement.parameters():
        nn.init.normal_(parameter, std=0.5)
    inputs = dict(placement.named_parameters())
    state = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def block(state: Tensor, *values: Tensor) -> Tensor:
        parameters = dict(zip(inputs, values, strict=True))
        return torch.func.functional_call(placement, parameters, (state, torch.tanh, lambda x: x.sin()))

    assert torch.autograd.gradcheck(block, (state, *(p.detach().requires_grad_() for p in inputs.values())))


def as_prenorm(model: Transformer, **options: Any) -> Transformer:
    """PreNorm with the same weights, and the gains that the options give its norms."""
    plain = Transformer(
        tiny_config(placement="prenorm", num_layers=4, placement_options={"final_norm": False}), VOCAB_SIZE
    )
    plain = plain.double()
    plain.load_state_dict(model.state_dict(), strict=False)
    return plain


@pytest.mark.parametrize("streams", [2, 4])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hc", {}),
        ("hc", {"static": True}),
        ("mhc", {"start": "identity"}),
        ("mhc", {"start": "uniform"}),
        ("ihc", {}),
    ],
)
def test_it_starts_as_prenorm_with_so_many_times_the_stream(name: str, options: dict[str, Any], streams: int) -> None:
    """hc as it starts; mhc and ihc but for phi, whatever res: of equal streams any mean is the stream itself."""
    options = {**options, "streams": streams, "final_norm": False}
    model = Transformer(tiny_config(placement=name, num_layers=4, placement_options=options), VOCAB_SIZE).double()
    initialize(model)
    h = torch.randn(2, SEQ, 32, dtype=torch.float64)
    drawn = through(model, h)
    for block in model.blocks:
        for mapping in block.placement.mappings():
            if name != "hc":
                assert bool((mapping.phi != 0).all())
                nn.init.zeros_(mapping.phi)
    expected = streams * through(as_prenorm(model), h)
    torch.testing.assert_close(through(model, h), expected, atol=1e-12, rtol=1e-12)
    assert torch.allclose(drawn, expected, atol=0, rtol=1e-9) == (name == "hc")
    torch.testing.assert_close(drawn, expected, atol=0.05, rtol=0.05)


def test_gr_without_its_matrices_is_prenorm_with_half_its_norms() -> None:
    model = Transformer(tiny_config(placement="gr", num_layers=4, placement_options={"final_norm": False}), VOCAB_SIZE)
    initialize(model)
    model = model.double()
    plain = as_prenorm(model)
    for block, other in zip(model.blocks, plain.blocks, strict=True):
        for mapping, norm in zip(
            block.placement.mappings(), (other.placement.norm_attn, other.placement.norm_ffn), strict=True
        ):
            nn.init.constant_(norm.weight, 0.5)
            for weight in (mapping.down, mapping.up, mapping.weigh):
                nn.init.zeros_(weight)
    h = torch.randn(2, SEQ, 32, dtype=torch.float64)
    torch.testing.assert_close(through(model, h), 4 * through(plain, h), atol=1e-12, rtol=1e-12)


def test_the_start_of_each_coefficient() -> None:
    streams = torch.randn(6, 4, 16)
    norm = NormFactory("rmsnorm", 16)
    for index in (1, 2, 3):
        for k, mapping in enumerate(PLACEMENTS["hc"](Depth(index, 3), norm).mappings()):
            pre, post, res = mapping(streams)[-1]
            assert bool((pre == torch.eye(4)[(2 * (index - 1) + k) % 4]).all())
            assert bool((post == 1).all())
            assert bool((res == torch.eye(4)).all())
            assert mapping.scale.tolist() == pytest.approx([0.01, 0.01])
    for start, expected in (("identity", torch.eye(4)), ("uniform", torch.full((4, 4), 0.25))):
        for mapping in PLACEMENTS["mhc"](Depth(1, 3), norm, start=start).mappings():
            pre, post, res = mapping(streams)[-1]
            torch.testing.assert_close(pre, torch.full((6, 4), 0.25), atol=0.02, rtol=0)
            torch.testing.assert_close(post, torch.ones(6, 4), atol=0.03, rtol=0)
            torch.testing.assert_close(res, expected.expand(6, 4, 4), atol=0.03, rtol=0)
    for mapping in PLACEMENTS["gr"](Depth(1, 3), norm).mappings():
        gates, post, res = mapping(streams)[-1]
        torch.testing.assert_close(gates, torch.full((6, 4, 16), 0.5), atol=0.03, rtol=0)
        torch.testing.assert_close(post, torch.ones(6, 4), atol=0.2, rtol=0)
        assert res is None
        assert mapping.down.shape == (2, 64)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hc", {"scale": 0.5}),
        ("mhc", {"scale": 0.5, "std": 0.1}),
        ("ihc", {"scale": 0.5, "std": 0.1}),
        ("gr", {"std": 0.1, "rank": 5}),
    ],
)
def test_options_say_where_coefficients_start(name: str, options: dict[str, Any]) -> None:
    """By the library alone, and after an init of the suite."""
    by_itself = PLACEMENTS[name](Depth(1, 2), NormFactory("rmsnorm", 64), **options)
    model = Transformer(tiny_config(placement=name, dim=64, placement_options=options), VOCAB_SIZE)
    initialize(model)
    for placement in (by_itself, model.blocks[1].placement):
        for mapping in placement.mappings():
            if "scale" in options:
                assert set(mapping.scale.tolist()) == {0.5}
            if "std" in options:
                for matrix in mapping.matrices():
                    assert matrix.weight.std().item() == pytest.approx(0.1, rel=0.1)
            if name == "gr":
                assert (tuple(mapping.down.shape), tuple(mapping.up.shape)) == ((5, 256), (256, 5))


@of_names
def test_matrices_are_drawn_as_the_placement_says_under_every_init(name: str) -> None:
    for init in ("fan_in", "plain"):
        model = Transformer(tiny_config(placement=name, init=init, dim=64), VOCAB_SIZE)
        initialize(model)
        matrices = [matrix for matrix in model.matrices() if matrix.role == "residual"]
        assert len(matrices) == 4 * (3 if name == "gr" else 1)
        for matrix in matrices:
            assert matrix.weight.shape == (matrix.fan_out, matrix.fan_in)
            std = 0.0 if name == "hc" else 0.02
            assert matrix.weight.detach().std().item() == pytest.approx(std, rel=0.15)
    assert not [
        m
        for m in Transformer(tiny_config(placement="hc", placement_options={"static": True}), 9).matrices()
        if m.role == "residual"
    ]


@of_names
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16-true", "bf16-mixed"])
def test_coefficients_are_computed_in_fp32(name: str, dtype: torch.dtype) -> None:
    """From what the streams and weights are stored in, and no narrower: the same as of their values in fp32."""
    placement = PLACEMENTS[name](Depth(1, 2), NormFactory("none", 32)).to(dtype)
    for parameter in placement.parameters():
        nn.init.normal_(parameter)
    streams = torch.randn(5, 4, 32).to(dtype)
    for mapping in placement.mappings():
        exact = copy.deepcopy(mapping).float()(streams.float())[-1]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            found = mapping(streams)[-1]
        for narrow, wide in zip(found, exact, strict=True):
            if wide is not None and wide.shape != (
                5,
                4,
                32,
            ):  # gr's gates are as wide as the streams, and in their type
                assert narrow.dtype == torch.float32
                torch.testing.assert_close(narrow, wide, atol=1e-6, rtol=1e-5)


@of_names
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16-true", "bf16-mixed"])
def test_streams_keep_their_type(name: str, dtype: torch.dtype) -> None:
    model = Transformer(tiny_config(placement=name), VOCAB_SIZE)
    initialize(model)
    model = model.to(dtype)
    states: list[Tensor] = []
    for block in model.blocks:
        block.placement.register_forward_hook(lambda module, inputs, output: states.append(output))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        model(tokens(2, SEQ))[0].float().square().mean().backward()
    assert [state.dtype for state in states] == [dtype] * 2
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@of_names
def test_a_block_keeps_the_streams_twice_and_little_else(name: str) -> None:
    """Between forward and backward: the streams before each sublayer, and their outputs, beside what PreNorm keeps."""

    def kept(name: str) -> int:
        block = PLACEMENTS[name](Depth(1, 2), NormFactory("rmsnorm", 256))
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        state = block.enter(torch.randn(1, 64, 256, requires_grad=True))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = block(state, lambda x: x, lambda x: x)
        mine = {p.untyped_storage().data_ptr() for p in block.parameters()}
        assert out.shape == state.shape
        return sum(size for pointer, size in sizes.items() if pointer not in mine)

    streams = 4 * 64 * 256 * 4
    limit = {"hc": 2.75, "mhc": 2.75, "ihc": 2.75, "gr": 10.5}[name] * streams  # gr: normed, gates and their products
    assert 2 * streams <= kept(name) <= kept("prenorm") + limit


@pytest.mark.parametrize("phi", ["drawn", "zero"])
@pytest.mark.parametrize("name", ["hc", "mhc", "ihc"])
def test_the_streams_part_where_they_are_not_read_alike(name: str, phi: str) -> None:
    """Why phi is drawn: copies that are read and written alike would have one gradient, and stay copies for ever."""
    model = Transformer(tiny_config(placement=name), VOCAB_SIZE).double()
    initialize(model)
    mappings = [mapping for block in model.blocks for mapping in block.placement.mappings()]
    if phi == "zero":
        for mapping in mappings:
            nn.init.zeros_(mapping.phi)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    states: list[Tensor] = []
    model.blocks[-1].placement.register_forward_hook(lambda module, inputs, output: states.append(output))
    sequence = tokens(4, SEQ)
    for _ in range(3):
        optimizer.zero_grad()
        logits = model(sequence[:, :-1])[0]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), sequence[:, 1:].flatten()).backward()
        optimizer.step()
    state = states[-1].detach()
    apart = (state - state.mean(2, keepdim=True)).square().mean() / state.square().mean()
    if phi == "drawn" or name == "hc":  # which begins by reading one stream each
        assert apart > 1e-9
    else:
        assert apart < 1e-20


def test_a_mapping_is_what_monitors_hook() -> None:
    placement = PLACEMENTS["mhc"](Depth(2, 3), NormFactory("rmsnorm", 8))
    assert [type(mapping) for mapping in placement.mappings()] == [ConstrainedMapping] * 2
    assert isinstance(placement.mappings()[0](torch.randn(3, 4, 8))[-1], Mapping)
    assert PLACEMENTS["prenorm"](Depth(1, 3), NormFactory("rmsnorm", 8)).mappings() == ()
