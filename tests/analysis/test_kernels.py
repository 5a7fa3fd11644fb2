"""Every formula on second moments against draws of the weights themselves."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.kernels import Attention, Gains, SwiGLU, mean_off_diagonal, normalize, softmax_moments

SEQ, DIM, HEADS, DRAWS, THETA = 6, 256, 4, 64, 100.0


def with_kernel(kernel: Tensor) -> Tensor:
    """x [seq, DIM], random, with exactly these inner products over DIM."""
    basis = torch.linalg.qr(torch.randn(DIM, len(kernel), dtype=torch.float64))[0].T * math.sqrt(DIM)
    return torch.linalg.cholesky(kernel) @ basis


def correlated(rho: float, variance: float = 1.0) -> Tensor:
    eye = torch.eye(SEQ, dtype=torch.float64)
    return variance * (rho + (1 - rho) * eye)


def weight(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64) / math.sqrt(columns)


def turned(x: Tensor) -> Tensor:
    """RoPE on [heads, seq, width], as complex rotation."""
    width = x.size(-1)
    angles = torch.arange(SEQ)[:, None] * THETA ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    pairs = torch.complex(x[..., : width // 2], x[..., width // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def draw_attention(x: Tensor) -> Tensor:
    """Causal attention with fresh weights, for whatever torch.manual_seed has left."""
    q, k, v = ((x @ weight(DIM, DIM).T).unflatten(-1, (HEADS, -1)).transpose(0, 1) for _ in range(3))
    scores = turned(q) @ turned(k).mT / math.sqrt(DIM / HEADS)
    weights = scores.masked_fill(torch.ones(SEQ, SEQ).triu(1).bool(), -math.inf).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1) @ weight(DIM, DIM).T


def draw_swiglu(x: Tensor) -> Tensor:
    hidden = 3 * DIM
    return (F.silu(x @ weight(hidden, DIM).T) * (x @ weight(hidden, DIM).T)) @ weight(DIM, hidden).T


def averages(draw: object, x: Tensor, gradient: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Kernels of the output and of the gradient with respect to x, averaged over draws of the weights."""
    out_kernel, in_kernel = torch.zeros(SEQ, SEQ).double(), torch.zeros(SEQ, SEQ).double()
    for _ in range(DRAWS):
        leaf = x.clone().requires_grad_()
        out = draw(leaf)  # type: ignore[operator]
        (back,) = torch.autograd.grad(out, leaf, gradient)
        out_kernel += out.detach() @ out.detach().T / DIM
        in_kernel += back @ back.T / DIM
    return (out_kernel / DRAWS).numpy(), (in_kernel / DRAWS).numpy()


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0, 2.0])
def test_moments_of_a_softmax(spread: float) -> None:
    concentration, sensitivity = softmax_moments(np.full(20, spread))
    for n in (1, 2, 3, 8, 20):
        p = (math.sqrt(spread) * torch.randn(20000, n, dtype=torch.float64)).softmax(-1)
        jacobian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        assert concentration[n - 1] == pytest.approx(float(p.square().sum(-1).mean()), rel=0.03)
        assert sensitivity[n - 1] == pytest.approx(float(jacobian.square().sum((1, 2)).mean()), rel=0.03, abs=1e-6)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("grad_rho", [0.0, 0.7])
def test_attention(rho: float, grad_rho: float) -> None:
    kernel, gradient = correlated(rho), correlated(grad_rho)
    out, back = averages(draw_attention, with_kernel(kernel), with_kernel(gradient))
    theory = Attention(kernel.numpy(), Gains())
    np.testing.assert_allclose(theory.out, out, rtol=0.1, atol=0.02)
    predicted = theory.backward(gradient.numpy())
    assert np.trace(predicted) == pytest.approx(np.trace(back), rel=0.1)
    np.testing.assert_allclose(predicted, back, rtol=0.2, atol=0.1)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9])
def test_swiglu(rho: float) -> None:
    kernel, gradient = correlated(rho), correlated(0.5)
    out, back = averages(draw_swiglu, with_kernel(kernel), with_kernel(gradient))
    theory = SwiGLU(kernel.numpy(), Gains())
    np.testing.assert_allclose(theory.out, out, rtol=0.05, atol=0.01)
    np.testing.assert_allclose(theory.backward(gradient.numpy()), back, rtol=0.05, atol=0.02)


def test_swiglu_of_unit_variance_by_numerical_integration() -> None:
    u = torch.linspace(-12, 12, 20001, dtype=torch.float64, requires_grad=True)
    density = torch.exp(-(u.detach() ** 2) / 2) / math.sqrt(2 * math.pi)
    (slope,) = torch.autograd.grad(F.silu(u).sum(), u)
    variance, derivative = (float(torch.trapezoid(y.detach() ** 2 * density, u.detach())) for y in (F.silu(u), slope))
    theory = SwiGLU(np.ones((1, 1)), Gains())
    assert theory.out[0, 0] == pytest.approx(variance, rel=1e-5)
    assert theory.slope[0, 0] == pytest.approx(variance + derivative, rel=1e-5)
    assert (variance, derivative) == (pytest.approx(0.355776, abs=1e-5), pytest.approx(0.379482, abs=1e-5))


def test_gains_scale_what_their_matrices_are_part_of() -> None:
    kernel, gradient = correlated(0.3, 2.0).numpy(), np.eye(SEQ)
    plain, scaled = (Attention(kernel, gains) for gains in (Gains(), Gains(value=0.5, attn_out=0.2)))
    np.testing.assert_allclose(scaled.out, 0.1 * plain.out)
    np.testing.assert_allclose(scaled.backward(gradient), 0.1 * plain.backward(gradient))
    # Logits of no variance: uniform weights over t + 1 keys, and no gradient through queries and keys.
    flat = Attention(2 * np.eye(SEQ), Gains(query=0.0))
    np.testing.assert_allclose(np.diag(flat.out), [2 / n for n in range(1, SEQ + 1)])
    assert np.trace(flat.backward(gradient)) == pytest.approx(sum(1 / n for n in range(1, SEQ + 1)))
    unit, small = (SwiGLU(np.ones((1, 1)), gains).out for gains in (Gains(ffn_down=0.1), Gains(ffn_up=1e-8)))
    assert unit[0, 0] == pytest.approx(0.0355776, abs=1e-6)
    assert small[0, 0] == pytest.approx(1e-16 / 4, rel=1e-3)  # silu(u) is u / 2 near 0


def test_normalize_and_mean() -> None:
    kernel = np.array([[4.0, 1.0], [1.0, 9.0]])
    np.testing.assert_allclose(normalize(kernel), [[1, 1 / 6], [1 / 6, 1]])
    assert mean_off_diagonal(kernel) == 1.0
    assert mean_off_diagonal(np.ones((1, 1))) == 0.0
