"""The two products by expert, against a loop of masked rows, and their gradients of first and second order."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import profile

from lightning_modules.layers import expert_products
from lightning_modules.layers.expert_products import GROUPED, LOOP, Products
from tests.support.expert_rows import COUNTS, EXPERT, FEW
from tests.support.operators import opcheck


def operands() -> list[Tensor]:
    """x [10, 8], w [4, 16, 8], y [10, 16]."""
    return [torch.randn(*shape, requires_grad=True) for shape in ((10, 8), (4, 16, 8), (10, 16))]


@pytest.mark.parametrize("products", [LOOP, GROUPED], ids=["loop", "grouped"])
def test_each_row_meets_its_experts_matrix(products: Products) -> None:
    x, w, y = operands()
    transposed = torch.stack([x[t] @ w[e].T for t, e in enumerate(EXPERT)])
    plain = torch.stack([y[t] @ w[e] for t, e in enumerate(EXPERT)])
    of_experts = [(e == EXPERT)[:, None] for e in range(4)]
    outer = torch.stack([(y * mine).T @ x for mine in of_experts])
    for actual, expected, of in (
        (products.matmul(x, w, COUNTS, True), transposed, (x, w)),
        (products.matmul(y, w, COUNTS, False), plain, (y, w)),
        (products.outer(y, x, COUNTS), outer, (y, x)),
    ):
        torch.testing.assert_close(actual, expected)
        direction = torch.randn_like(actual)
        gradients = torch.autograd.grad((actual * direction).sum(), of)
        torch.testing.assert_close(gradients, torch.autograd.grad((expected * direction).sum(), of))


@pytest.mark.parametrize("products", [LOOP, GROUPED], ids=["loop", "grouped"])
def test_one_gradient_alone(products: Products) -> None:
    x, w, y = operands()
    loss = products.matmul(x.detach(), w, COUNTS, True).sum() + products.matmul(y, w.detach(), COUNTS, False).sum()
    transposed = torch.stack([x[t] @ w[e].T for t, e in enumerate(EXPERT)]).sum()
    plain = torch.stack([y[t] @ w[e] for t, e in enumerate(EXPERT)]).sum()
    expected = (*torch.autograd.grad(transposed, w), *torch.autograd.grad(plain, y))
    torch.testing.assert_close(torch.autograd.grad(loss, (w, y)), expected)


@pytest.mark.parametrize("name", ["loop", "grouped"])
def test_the_operators_keep_torchs_rules(name: str) -> None:
    operators = getattr(torch.ops, expert_products.__name__.replace(".", "_"))
    matmul, outer = (getattr(operators, f"{name}_{kind}").default for kind in ("matmul", "outer"))
    x, w, y = operands()
    opcheck(matmul, (x, w, COUNTS, True))
    opcheck(matmul, (y, w, COUNTS, False))
    opcheck(outer, (y, x, COUNTS))


@pytest.mark.parametrize("products", [LOOP, GROUPED], ids=["loop", "grouped"])
def test_in_inference_they_are_the_same_and_operators_no_longer(products: Products) -> None:
    x, w, y = operands()
    expected = [products.matmul(x, w, COUNTS, True).detach(), products.matmul(y, w, COUNTS, False).detach()]
    with torch.inference_mode(), profile() as profiled:
        found = [products.matmul(x, w, COUNTS, True), products.matmul(y, w, COUNTS, False)]
    assert not [event.name for event in profiled.events() if event.name.startswith("lightning_modules")]
    torch.testing.assert_close(found, expected)


def test_gradients_in_float64_to_second_order() -> None:
    shapes = ((3, 2), (3, 3, 2), (3, 3))
    x, w, y = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    for check in (gradcheck, gradgradcheck):
        assert check(lambda x, w: LOOP.matmul(x, w, FEW, True), (x, w))
        assert check(lambda y, w: LOOP.matmul(y, w, FEW, False), (y, w))
        assert check(lambda y, x: LOOP.outer(y, x, FEW), (y, x))


def test_what_a_kernel_leaves_of_an_expert_without_rows_is_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """As F.grouped_mm does on some devices; the others' gradients are what they were."""
    _, _, y = operands()
    x, plain = torch.randn(10, 8), F.grouped_mm

    def leaving(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        out = plain(a, b, offs=offs)
        if b.dim() == 2:
            out[COUNTS == 0] = torch.nan
        return out

    expected = GROUPED.outer(y, x, COUNTS)
    monkeypatch.setattr(F, "grouped_mm", leaving)
    assert torch.equal(GROUPED.outer(y, x, COUNTS), expected)
    w = torch.randn(4, 16, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(GROUPED.matmul(x, w, COUNTS, True).sum(), w)
    assert gradient[1].count_nonzero() == 0
    assert gradient.isfinite().all()
