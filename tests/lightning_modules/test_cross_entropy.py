"""The loss in chunks, against torch's own over all logits: values, gradients, memory, and the module around it."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules import cross_entropy, language_module
from lightning_modules.cross_entropy import linear_cross_entropy
from lightning_modules.source_loss import SourceLoss
from tests.support.models import VOCAB_SIZE, make_module, tokens


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK, "cpu", 8)


def problem(num_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(num_tokens, 16, dtype=dtype), torch.randn(40, 16, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(40, (num_tokens,))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize(
    ("num_tokens", "compiled"), [(1, False), (8, False), (21, False), pytest.param(21, True, marks=pytest.mark.slow)]
)
def test_it_is_the_cross_entropy_of_all_logits(num_tokens: int, compiled: bool) -> None:
    hidden, weight, targets = problem(num_tokens)
    losses = linear_cross_entropy(hidden, weight, targets, compiled)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(losses.by_token, expected)
    torch.testing.assert_close(losses.mean, expected.mean())
    assert not losses.by_token.requires_grad
    actual = torch.autograd.grad(losses.mean * 3, (hidden, weight))
    torch.testing.assert_close(actual, torch.autograd.grad(expected.mean() * 3, (hidden, weight)))


def test_under_autocast_products_are_narrow_and_the_loss_is_not() -> None:
    hidden, weight, targets = problem(21)
    with torch.autocast("cpu", torch.bfloat16):
        losses = linear_cross_entropy(hidden, weight, targets)
        expected = F.cross_entropy(F.linear(hidden, weight).float(), targets)
    assert losses.mean.dtype == losses.by_token.dtype == torch.float32
    torch.testing.assert_close(losses.mean, expected, rtol=1e-3, atol=0)
    actual = torch.autograd.grad(losses.mean, (hidden, weight))
    assert {gradient.dtype for gradient in actual} == {torch.float32}
    torch.testing.assert_close(actual, torch.autograd.grad(expected, (hidden, weight)), rtol=0.05, atol=1e-3)


def test_no_tensor_is_as_large_as_all_logits() -> None:
    hidden, weight, targets = problem(64)
    sizes = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, Tensor) else 0)
            return out

    with Watch():
        linear_cross_entropy(hidden, weight, targets).mean.backward()
    assert 8 * 40 in sizes, "one chunk's logits were seen"
    assert max(sizes) < 64 * 40


def test_without_gradients_none_are_made() -> None:
    hidden, weight, targets = problem(21)
    expected = linear_cross_entropy(hidden, weight, targets).mean
    with torch.no_grad():
        losses = linear_cross_entropy(hidden, weight, targets)
    assert torch.equal(losses.mean, expected)
    assert not losses.mean.requires_grad


@pytest.mark.parametrize("optim", [{}, {"width_scaling": "mup", "base_width": 16}], ids=["plain", "mup"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_module_of_large_vocabulary_learns_the_same(
    tied: bool, optim: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module(optim, tie_embeddings=tied)
    batch = {"tokens": tokens(4, 9), "source": torch.tensor([0, 1, 1, 0])}

    def measured() -> tuple[Tensor, dict[str, Tensor], list[nn.Parameter]]:
        mine, sources = copy.deepcopy(module), SourceLoss(("a", "b"), "loss")
        loss, _ = mine.compute_loss(batch)
        loss.backward()
        torch.testing.assert_close(mine.compute_loss(batch, sources)[0], loss)
        return loss, sources.compute(), [parameter.grad for parameter in mine.parameters()]

    expected = measured()
    monkeypatch.setattr(language_module, "LARGE_VOCABULARY", VOCAB_SIZE)
    module.model.head.register_forward_hook(lambda *_: pytest.fail("all logits at once"))
    torch.testing.assert_close(measured(), expected)
