"""The loop's own SwiGLU against rows times their experts' matrices written out, and its gradients of both orders."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import silu
from torch.profiler import ProfilerActivity, profile

from lightning_modules.layers.cpu_kernels import expert_swiglu
from lightning_modules.layers.cpu_kernels.expert_swiglu import FUSED_LOOP
from lightning_modules.layers.expert_products import LOOP, Products
from tests.support.expert_rows import COUNTS, EXPERT, FEW
from tests.support.operators import opcheck

ALL = (0, 1, 2)


def operands(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x [10, 8], gate and up [4, 16, 8]."""
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((10, 8), (4, 16, 8), (4, 16, 8))]


def written_out(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return torch.stack([silu(gate[e] @ x[t]) * (up[e] @ x[t]) for t, e in enumerate(EXPERT)])


@pytest.mark.parametrize("wanted", [ALL, (0,), (1,), (0, 2)])
def test_each_row_meets_its_experts_matrices(wanted: tuple[int, ...]) -> None:
    tensors = [tensor if i in wanted else tensor.detach() for i, tensor in enumerate(operands())]
    of = [tensors[i] for i in wanted]
    actual, expected = FUSED_LOOP.swiglu(*tensors, COUNTS), written_out(*tensors)
    torch.testing.assert_close(actual, expected)
    direction = torch.randn_like(actual)
    gradients = torch.autograd.grad(actual, of, direction)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, of, direction))
    if 1 in wanted:
        assert not gradients[wanted.index(1)][1].any(), "an expert without rows"


def test_bf16_is_as_exact_as_the_plain_products() -> None:
    tensors, direction = operands(torch.float64), torch.randn(10, 16, dtype=torch.float64)
    exact = torch.autograd.grad(written_out(*tensors), tensors, direction)
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in tensors]

    def error(products: Products) -> float:
        gradients = torch.autograd.grad(products.swiglu(*halves, COUNTS), halves, direction.bfloat16())
        return max(((a - b).norm() / b.norm()).item() for a, b in zip(gradients, exact, strict=True))

    assert error(FUSED_LOOP) < 1.2 * error(LOOP) < 0.02


@pytest.mark.parametrize("wanted", [ALL, (0,), (0, 2)])
def test_gradients_in_float64_to_second_order(wanted: tuple[int, ...]) -> None:
    shapes = ((3, 2), (3, 3, 2), (3, 3, 2))
    tensors = [torch.randn(*s, dtype=torch.float64, requires_grad=i in wanted) for i, s in enumerate(shapes)]
    for check in (gradcheck, gradgradcheck):
        assert check(lambda *tensors: FUSED_LOOP.swiglu(*tensors, FEW), tensors)


def test_gradients_to_be_differentiated_again_are_those_that_are_not() -> None:
    x, matrices, _ = operands(torch.float64)
    out = FUSED_LOOP.swiglu(x * matrices.sum(), matrices, matrices, COUNTS)  # each operand depends on another
    once, twice = (
        torch.autograd.grad(out.sum(), (x, matrices), retain_graph=True, create_graph=again) for again in (False, True)
    )
    torch.testing.assert_close(twice, once)


def test_the_backward_pass_makes_hidden_layers_for_one_expert_at_a_time() -> None:
    x, gate, up = (torch.randn(*shape, requires_grad=True) for shape in ((64, 4), (4, 32, 4), (4, 32, 4)))

    def largest(products: Products) -> int:
        out = products.swiglu(x, gate, up, torch.full((4,), 16.0))
        direction = torch.ones_like(out)
        # Without acc_events torch 2.11 warns.
        with profile(activities=[ProfilerActivity.CPU], acc_events=True, profile_memory=True) as run:
            torch.autograd.grad(out, (x, gate, up), direction)
        return max(event.self_cpu_memory_usage for event in run.events())

    assert (largest(FUSED_LOOP), largest(LOOP)) == (4 * 16 * 32, 4 * 64 * 32)  # bytes in fp32


def test_the_operators_keep_torchs_rules() -> None:
    x, gate, up = operands()
    opcheck(expert_swiglu._forward, (x, gate, up, COUNTS))
    hidden, *saved = expert_swiglu._forward(x, gate, up, COUNTS)
    detached = [t.detach() for t in (hidden, x, gate, up, COUNTS, *saved)]
    opcheck(expert_swiglu._backward, detached)


def test_a_compiled_one_is_one_graph_with_the_same_gradients() -> None:
    def loss(*tensors: Tensor) -> Tensor:
        return FUSED_LOOP.swiglu(*tensors, COUNTS).square().sum()

    tensors = operands()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    actual, expected = (torch.autograd.grad(f(*tensors), tensors) for f in (compiled, loss))
    torch.testing.assert_close(actual, expected)
