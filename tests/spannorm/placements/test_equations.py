"""Schemes against their equations in double precision, forward and backward, around sublayers of a few numbers."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from spannorm import PLACEMENTS, Depth, NormFactory, Placement, SourceAttention
from tests.support import schemes
from tests.support.placements import norms_of
from tests.support.schemes import SCHEMES, At, Scheme

DIM, SEQ, LAYERS, EPS = 6, 5, 4, 1e-3
GPAS: dict[str, Scheme] = {
    "prenorm": SCHEMES["prenorm"]._replace(equation=schemes.prenorm_gpas),
    "sandwich": SCHEMES["sandwich"]._replace(equation=schemes.sandwich_gpas),
    "lnscaling": SCHEMES["lnscaling"]._replace(equation=schemes.lnscaling_gpas),
    "deepnorm": SCHEMES["deepnorm"]._replace(equation=schemes.deepnorm_gpas),
    "mixln": SCHEMES["mixln"]._replace(equation=schemes.mixln_gpas),
    "postnorm": SCHEMES["postnorm"]._replace(equation=schemes.postnorm_gpas),
    "subln": SCHEMES["subln"]._replace(equation=schemes.prenorm_gpas),
}


class Case(NamedTuple):
    name: str
    options: dict[str, Any]
    scheme: Scheme


CASES = [
    *(Case(name, {"gpas": True}, scheme) for name, scheme in GPAS.items()),
    Case("attnres", {}, SCHEMES["attnres"]),
    Case("attnres", {"group": 2}, SCHEMES["attnres"]._replace(equation=schemes.attnres_by_2)),
    Case("attnres", {"group": 3}, SCHEMES["attnres"]._replace(equation=schemes.attnres_by_3)),
    Case("attnres", {"group": 99}, SCHEMES["attnres"]._replace(equation=schemes.attnres_in_one)),
]


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    """Constants, too, are made in double precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


cases = pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join([case.name, *map(str, case.options.items())]))


class Sublayer(nn.Module):
    """tanh(W x), which mixes features and no positions; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(DIM, DIM))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (x @ self.weight.T).tanh()


class Stack(nn.Module):
    """Blocks of one placement, every parameter random."""

    def __init__(
        self, name: str, norm: str = "rmsnorm", num_layers: int = LAYERS, eps: float = EPS, **options: Any
    ) -> None:
        super().__init__()
        factory = NormFactory(norm, DIM, eps)
        self.placements = nn.ModuleList(
            PLACEMENTS[name](Depth(index, num_layers), factory, **options) for index in range(1, num_layers + 1)
        )
        self.sublayers = nn.ModuleList(Sublayer() for _ in range(2 * num_layers))
        with torch.no_grad():
            for name, parameter in self.placements.named_parameters():
                parameter.uniform_(0.5, 1.5)
                if name.endswith("gate"):
                    parameter.sub_(1)

    def blocks(self) -> Iterator[tuple[Placement, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
        for index, placement in enumerate(self.placements):
            assert isinstance(placement, Placement)
            yield placement, self.sublayers[2 * index], self.sublayers[2 * index + 1]

    def forward(self, h: Tensor) -> Tensor:
        state: Any = h
        for placement, attn, ffn in self.blocks():
            state = placement.enter(state) if placement.depth.is_first else state
            state = placement(state, attn, ffn)
            state = placement.leave(state) if placement.depth.is_last else state
        out: Tensor = state
        return out

    def by_equation(self, scheme: Scheme, h: Tensor) -> Tensor:
        state: Any = h
        for index, (placement, attn, ffn) in enumerate(self.blocks(), start=1):
            norms, parameters = norms_of(placement, EPS), dict(placement.named_parameters())
            gates = [gate for name, gate in parameters.items() if name.endswith("gate")]
            normed = lambda name, x, norms=norms: norms[name](x)  # noqa: E731
            at = At(index, len(self.placements), attn, ffn, normed, gates[0] if gates else None, parameters)
            state = scheme.equation(at, state)
        return scheme.leave(at, state)


def gradients(stack: Stack, out: Tensor, h: Tensor) -> dict[str, Tensor]:
    """Of every parameter, and of the input; each scalar of the output counts by a weight of its own."""
    named = {"input": h, **dict(stack.named_parameters())}
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return dict(zip(named, torch.autograd.grad((out * weight).sum(), list(named.values())), strict=True))


@cases
def test_forward_and_gradients_are_the_equations_and_sublayers_are_called_once(case: Case) -> None:
    stack = Stack(case.name, **case.options)
    h = torch.randn(2, SEQ, DIM, requires_grad=True)
    out = stack(h)
    assert [sublayer.calls for sublayer in stack.sublayers] == [1] * (2 * LAYERS)
    found = gradients(stack, out, h)
    expected = stack.by_equation(case.scheme, h)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for name, gradient in gradients(stack, expected, h).items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("name", GPAS)
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_gpas_starts_as_the_placement_without_it_to_the_bit(name: str, norm: str) -> None:
    """So PreNorm's weights, or any other scheme's, are taken over exactly."""
    plain, scaled = Stack(name, norm), Stack(name, norm, gpas=True)
    scaled.load_state_dict(plain.state_dict(), strict=False)
    gates = [gate for key, gate in scaled.named_parameters() if key.endswith("gpas.gate")]
    assert len(gates) == LAYERS, "one a block"
    for gate in gates:
        nn.init.zeros_(gate)
    h = torch.randn(2, SEQ, DIM, requires_grad=True)
    before, after = plain(h), scaled(h)
    assert torch.equal(before, after)
    expected, found = gradients(plain, before, h), gradients(scaled, after, h)
    assert all(torch.equal(found[key], gradient) for key, gradient in expected.items())
    assert all(found[key].abs() > 1e-6 for key in found if key.endswith("gpas.gate")), "it can open"


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("options", [{}, {"group": 2}, {"group": 3}, {"group": 99}], ids=str)
def test_attention_residuals_take_over_prenorms_weights(norm: str, options: dict[str, Any]) -> None:
    """The mean of all sources is PreNorm's stream over their number, which the norm behind it takes back."""
    plain = Stack("prenorm", norm, eps=1e-30)
    reading = Stack("attnres", norm, eps=1e-30, **options)
    reading.load_state_dict(plain.state_dict(), strict=False)
    h = torch.randn(2, SEQ, DIM)
    assert not torch.allclose(reading(h), plain(h), rtol=1e-2)
    for name, parameter in reading.placements.named_parameters():
        if name.endswith("query"):
            nn.init.zeros_(parameter)
    torch.testing.assert_close(reading(h), plain(h), rtol=1e-12, atol=1e-12)


def test_a_gate_at_1_makes_rezero_a_prenorm_without_norms_and_no_other() -> None:
    """So weights that were trained behind a norm are not taken over, whatever the gates are."""
    opened, h = Stack("rezero", "none"), torch.randn(2, SEQ, DIM)
    normed, bare = Stack("prenorm", "rmsnorm"), Stack("prenorm", "none")
    for stack in (normed, bare):
        stack.sublayers.load_state_dict(opened.sublayers.state_dict())
    for gate in opened.placements.parameters():
        nn.init.ones_(gate)
    torch.testing.assert_close(opened(h), bare(h), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(opened(h), normed(h), rtol=1e-1)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_gradients_of_attention_over_sources_to_second_order(count: int) -> None:
    reader, sources = SourceAttention(3, 1e-3), tuple(torch.randn(2, 2, 3, requires_grad=True) for _ in range(count))
    operands = (torch.randn(1, 3, requires_grad=True), torch.randn(3, requires_grad=True))

    def read(query: Tensor, gain: Tensor, *sources: Tensor) -> Tensor:
        parameters = {"query": query, "weight": gain}
        out: Tensor = torch.func.functional_call(reader, parameters, (sources,))
        return out

    assert torch.autograd.gradcheck(read, (*operands, *sources))
    assert torch.autograd.gradgradcheck(read, (*operands, *sources))


def test_attention_over_sources_lives_within_a_token_and_keeps_nothing_but_the_sources() -> None:
    """So generation has nothing to cache, and a deep model does not hold its sources once for each reader."""
    reader, sources = SourceAttention(DIM, EPS), tuple(torch.randn(2, SEQ, DIM, requires_grad=True) for _ in range(4))
    nn.init.normal_(reader.query)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        whole = reader(sources)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*sources, *reader.parameters())}
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} == own
    for token in range(SEQ):
        alone = reader(tuple(source[:, token : token + 1] for source in sources))
        torch.testing.assert_close(whole[:, token : token + 1], alone, rtol=1e-12, atol=1e-12)
    assert torch.allclose(reader.weights(sources).sum(0), torch.ones(2, SEQ))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16 sources", "fp32 sources"])
def test_weights_of_sources_are_computed_in_fp32_under_bf16(stored: torch.dtype, dtype: torch.dtype) -> None:
    """From what sources and parameters are stored in, and no narrower."""
    torch.set_default_dtype(torch.float32)
    reader = SourceAttention(64, 1e-6)
    for parameter in reader.parameters():
        nn.init.normal_(parameter)
    reader = reader.to(stored)
    sources = tuple(torch.randn(2, SEQ, 64).to(dtype) for _ in range(3))
    exact = copy.deepcopy(reader).double().weights(tuple(source.double() for source in sources))
    with torch.autocast("cpu", torch.bfloat16, enabled=stored == torch.float32):
        weights, mean = reader.weights(sources), reader(sources)
    assert (weights.dtype, mean.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(weights.double(), exact, rtol=1e-5, atol=1e-6)
