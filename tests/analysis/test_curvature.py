"""The ends of the spectrum, by products with a matrix, against numbers that are known."""

import math

import pytest
import torch
from torch import Tensor

from analysis.curvature import extreme_eigenvalues, top_eigenvalue


def parabola(curvatures: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.ones(len(curvatures), dtype=curvatures.dtype, requires_grad=True)
    return (curvatures * x**2).sum() / 2, x


@pytest.mark.parametrize(("curvatures", "top"), [([1.0, -7.0, 2.0], -7.0), ([1.0, -7.0, 8.0], 8.0), ([-3.0], -3.0)])
def test_of_a_parabola_it_is_exact(curvatures: list[float], top: float) -> None:
    """Also where there are more iterations than dimensions."""
    loss, x = parabola(torch.tensor(curvatures, dtype=torch.float64))
    assert top_eigenvalue(loss, [x], iterations=40).item() == pytest.approx(top)


def test_a_direction_in_which_the_loss_is_linear_has_none() -> None:
    loss, x = parabola(torch.tensor([1.0, 4.0]))
    y = torch.ones(2, requires_grad=True)
    assert top_eigenvalue(loss + 3 * y.sum(), [x, y], iterations=10).item() == pytest.approx(4.0)


def test_both_ends_of_a_random_matrix() -> None:
    """In two parts, of which the iteration must make one vector; to three digits, with eigenvalues close together."""
    matrix = torch.randn(200, 200, dtype=torch.float64)
    matrix = matrix + matrix.T
    spectrum = torch.linalg.eigvalsh(matrix)

    def multiply(vector: list[Tensor]) -> list[Tensor]:
        product = matrix @ torch.cat([part.flatten() for part in vector])
        return [product[:60].view(6, 10), product[60:]]

    like = [torch.zeros(6, 10, dtype=torch.float64), torch.zeros(140, dtype=torch.float64)]
    smallest, largest = extreme_eigenvalues(multiply, like, iterations=60)
    assert smallest.item() == pytest.approx(spectrum[0].item(), rel=1e-3)
    assert largest.item() == pytest.approx(spectrum[-1].item(), rel=1e-3)


def test_the_smallest_of_a_bowl_is_not_zero() -> None:
    """Where the operator's space is spanned, an iteration more would find a direction without any curvature."""
    smallest, largest = extreme_eigenvalues(lambda vector: [5.0 * vector[0]], [torch.zeros(4)], iterations=10)
    assert smallest.item() == pytest.approx(5.0)
    assert largest.item() == pytest.approx(5.0)


def test_a_loss_that_is_no_number_has_no_curvature() -> None:
    loss, x = parabola(torch.tensor([1.0, math.nan]))
    assert math.isnan(top_eigenvalue(loss, [x], iterations=5).item())
