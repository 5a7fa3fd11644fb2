"""Attention over sources by gradients written out against the library's, to second order; and where it steps aside."""

from typing import Any

import pytest
import torch
from torch import Tensor

import spannorm
from lightning_modules.layers.cpu_kernels import source_attention, use_cpu_kernels

DIM = 7


def readers(dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Two of the same weights: the library's, and the one that takes its place."""
    plain, fast = (spannorm.SourceAttention(DIM, 1e-3).to(dtype) for _ in range(2))
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter)
    fast.load_state_dict(plain.state_dict())
    use_cpu_kernels(fast)
    assert type(fast) is source_attention.SourceAttention
    return plain, fast


def results(reader: torch.nn.Module, sources: tuple[Tensor, ...]) -> list[Tensor]:
    """The mean, its gradients, and the gradients of their squares."""
    wanted = [*sources, *reader.parameters()]
    mean = reader(sources)
    weight = torch.linspace(-1, 2, mean.numel(), dtype=mean.dtype).view_as(mean)
    first = torch.autograd.grad((mean * weight).sum(), wanted, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted, materialize_grads=True)
    return [mean, *first, *second]


@pytest.mark.parametrize("count", [1, 2, 6])
def test_it_is_the_librarys_to_second_order(count: int) -> None:
    plain, fast = readers(torch.float64)
    sources = tuple(torch.randn(2, 3, DIM, dtype=torch.float64, requires_grad=True) for _ in range(count))
    for found, expected in zip(results(fast, sources), results(plain, sources), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn(2, 3, DIM, dtype=torch.float64)
    once = [torch.autograd.grad((r(sources) * weight).sum(), [*sources, *r.parameters()]) for r in (fast, plain)]
    for found, expected in zip(*once, strict=True):  # without a graph: the pass that is written out
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_narrow_types_are_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError

    plain, fast = readers(torch.bfloat16)
    monkeypatch.setattr(source_attention._SourceAttention, "apply", refuse)
    sources = tuple(torch.randn(2, 3, DIM, dtype=torch.bfloat16) for _ in range(3))
    torch.testing.assert_close(fast(sources), plain(sources), rtol=0, atol=0)
