"""Products by oneDNN: their equations, and where they are taken."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules.cross_entropy import linear_cross_entropy
from lightning_modules.layers.cpu_kernels import linear
from lightning_modules.layers.cpu_kernels.linear import Linear

ROWS, IN, OUT = (2, 5), 6, 4
NAME = "spannorm_cpu.matmul.default"
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")


class Count(TorchDispatchMode):
    """How often the product is oneDNN's."""

    def __init__(self) -> None:
        super().__init__()
        self.by_onednn = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.by_onednn += str(function) == NAME
        return function(*args, **kwargs or {})


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the processor and the size."""
    monkeypatch.setattr(linear, "PREFER_ONEDNN", True)
    monkeypatch.setattr(linear, "MIN_MULTIPLICATIONS", 0)


def operands() -> tuple[Linear, Tensor, Tensor]:
    """(a layer, x, a gradient of its output)."""
    return Linear(IN, OUT, bias=False), torch.randn(*ROWS, IN, requires_grad=True), torch.randn(*ROWS, OUT)


def equation(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("...i,oi->...o", x, weight)


@pytest.mark.parametrize("frozen", [None, "x", "weight"])
def test_the_product_and_its_gradients(frozen: str | None) -> None:
    layer, x, direction = operands()
    x.requires_grad_(frozen != "x")
    layer.weight.requires_grad_(frozen != "weight")
    with Count() as count:
        out = layer(x)
        out.backward(direction)
    assert count.by_onednn == 1 + (frozen != "x"), "the output and the gradient in x"
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, layer.weight)]
    expected = equation(*exact)
    expected.backward(direction.double())
    torch.testing.assert_close(out, expected.float())
    for tensor, reference in zip((x, layer.weight), exact, strict=True):
        if tensor.requires_grad:
            assert tensor.grad is not None
            assert reference.grad is not None
            torch.testing.assert_close(tensor.grad, reference.grad.float())
        else:
            assert tensor.grad is None


def test_any_strides() -> None:
    layer, x, direction = operands()
    strided = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    expected = torch.autograd.grad(equation(x, layer.weight), [x, layer.weight], direction)
    out = layer(strided)
    torch.testing.assert_close(out, equation(x, layer.weight))
    sides = direction.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(torch.autograd.grad(out, [strided, layer.weight], sides), expected)
    ones = torch.autograd.grad(layer(x).sum(), x)[0]  # whose gradient has no strides at all
    torch.testing.assert_close(ones, layer.weight.sum(0).expand_as(x))


def test_gradients_to_second_order() -> None:
    layer, x, _ = operands()

    def twice(forward: Any) -> tuple[Tensor, ...]:
        weight = layer.weight * x.sum()  # which depends on the other operand
        once = torch.autograd.grad(forward(x, weight).square().sum(), [x, layer.weight], create_graph=True)
        return *once, *torch.autograd.grad(sum(g.square().sum() for g in once), [x, layer.weight])

    torch.testing.assert_close(twice(linear.matmul), twice(F.linear))


def test_a_graph_holds_it_whole_forward_and_backward() -> None:
    layer, x, direction = operands()
    seen: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    backend: Any = aot_autograd(fw_compiler=keep)
    compiled: Any = torch.compile(layer, backend=backend, fullgraph=True)
    results = [
        (out := module(x), *torch.autograd.grad(out, [x, layer.weight], direction)) for module in (compiled, layer)
    ]
    torch.testing.assert_close(results[0], results[1])
    assert seen.count(NAME) == 2


def test_the_loss_takes_it_for_logits_and_their_gradient_in_the_hidden_states() -> None:
    layer, x, _ = operands()
    targets = torch.randint(OUT, (ROWS[0] * ROWS[1],))
    with Count() as count:
        mean, _ = linear_cross_entropy(x.flatten(0, 1), layer.weight, targets, product=linear.matmul)
    assert count.by_onednn == 2
    expected = F.cross_entropy(equation(x, layer.weight).flatten(0, 1), targets)
    torch.testing.assert_close(mean, expected)
    both = [torch.autograd.grad(loss, [x, layer.weight]) for loss in (mean, expected)]
    torch.testing.assert_close(both[0], both[1])


def test_inference_other_precisions_and_small_products_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, _ = operands()
    with Count() as count:
        with torch.no_grad():
            assert torch.equal(layer(x), F.linear(x, layer.weight))
            linear_cross_entropy(
                x.flatten(0, 1), layer.weight, torch.zeros(10, dtype=torch.long), product=linear.matmul
            )
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer.double()(x.double()).dtype == torch.float64
        layer.float()
        monkeypatch.setattr(linear, "MIN_MULTIPLICATIONS", 10 * IN * OUT + 1)
        layer(x)
        monkeypatch.setattr(linear, "MIN_MULTIPLICATIONS", 0)
        monkeypatch.setattr(linear, "PREFER_ONEDNN", False)
        layer(x)
    assert not count.by_onednn
    monkeypatch.setattr(linear, "PREFER_ONEDNN", True)
    monkeypatch.setattr(linear, "MIN_MULTIPLICATIONS", 10 * IN * OUT)
    with Count() as count:
        layer(x)
    assert count.by_onednn == 1


def test_a_matrix_that_is_cut_over_processes_is_left_to_torch() -> None:
    layer, x, _ = operands()
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        parallelize_module(layer, init_device_mesh("cpu", (2,)), ColwiseParallel())
        with Count() as count:
            assert layer(x).shape == (*ROWS, OUT // 2)
        assert not count.by_onednn
    finally:
        dist.destroy_process_group()
