"""The norm by hand: its equation, its gradients of both orders, what it keeps for them, and where it is taken."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

from lightning_modules.layers.cpu_kernels.rms_norm import rms_norm
from tests.support import reference

EPS = 1e-3
SHAPE = (2, 2, 3, 8)


def function(x: Tensor, gain: Tensor) -> Tensor:
    return rms_norm(x, gain, EPS)


def equation(x: Tensor, gain: Tensor) -> Tensor:
    return reference.rms_norm(x, gain, EPS)


def by_hand_made(result: Tensor) -> bool:
    assert result.grad_fn is not None
    return isinstance(result.grad_fn, torch.autograd.function.BackwardCFunction)


def operands(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x and gain."""
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in (SHAPE, SHAPE[-1:])]


def test_equations_and_their_gradients() -> None:
    tensors = operands()
    actual, expected = function(*tensors), equation(*tensors)
    assert by_hand_made(actual)
    torch.testing.assert_close(actual, expected)
    direction = torch.randn_like(actual)
    before = [tensor.clone() for tensor in (*tensors, direction)]
    gradients = torch.autograd.grad(actual, tensors, direction, retain_graph=True)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, tensors, direction))
    again = torch.autograd.grad(actual, tensors, direction)  # and what was kept, or is others', is as it was
    assert all(map(torch.equal, (*gradients, *before), (*again, *tensors, direction)))


@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_gradients_to_second_order(frozen: int | None) -> None:
    tensors = [tensor.requires_grad_(i != frozen) for i, tensor in enumerate(operands(torch.float64))]
    if any(tensor.requires_grad for tensor in tensors):
        assert gradcheck(function, tensors)
        assert gradgradcheck(function, tensors)


def test_gradients_to_be_differentiated_again_are_those_that_are_not() -> None:
    x, *others = operands(torch.float64)
    out = function(x, *[x.sum() * other for other in others])  # each operand depends on another
    once, twice = (
        torch.autograd.grad(out.square().sum(), x, retain_graph=True, create_graph=again)[0] for again in (False, True)
    )
    torch.testing.assert_close(twice, once)


def test_what_stays_until_the_backward_pass() -> None:
    tensors, kept = operands(), list[Tensor]()
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        function(*tensors)
    large = [tensor.data_ptr() for tensor in kept if tensor.numel() == tensors[0].numel()]
    assert set(large) <= {tensor.data_ptr() for tensor in tensors}, "no result in between"
    assert len(large) == 1


def test_layouts() -> None:
    x, *others = operands()
    strided = x.detach().mT.contiguous().mT.requires_grad_()  # as heads, where they are an axis of their own
    direction = torch.randn(SHAPE)
    out, expected = (function(tensor, *others) for tensor in (strided, x))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, [strided, *others], direction.mT.contiguous().mT),
        torch.autograd.grad(expected, [x, *others], direction),
    )
    nothing = function(x[:0], *[other[:0] if other.dim() > 1 else other for other in others])
    assert torch.autograd.grad(nothing.sum(), x)[0].eq(0).all()


def test_elsewhere_it_is_left_to_torch() -> None:
    """In half precision, which torch computes in fp32 in between, and in graphs, which a compiler fuses."""
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in operands()]
    out = function(*halves)
    assert out.dtype == torch.bfloat16
    assert not by_hand_made(out)
    torch.testing.assert_close(out.float(), equation(*[half.float() for half in halves]), rtol=0.05, atol=0.05)
    seen: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=keep, fullgraph=True)(*operands())
    assert compiled.requires_grad
    assert seen
    assert not any("autograd" in target for target in seen)
