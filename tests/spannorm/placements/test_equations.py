"""Schemes against their equations in double precision, forward and backward, around sublayers of a few numbers."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from spannorm import PLACEMENTS, Depth, NormFactory, Placement
from tests.support import schemes
from tests.support.schemes import SCHEMES, At, Scheme, norms_of

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


CASES = [Case(name, {"gpas": True}, scheme) for name, scheme in GPAS.items()]


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

    def __init__(self, name: str, norm: str = "rmsnorm", num_layers: int = LAYERS, **options: Any) -> None:
        super().__init__()
        factory = NormFactory(norm, DIM, EPS)
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
            at = At(index, len(self.placements), attn, ffn, normed, gates[0] if gates else None)
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
