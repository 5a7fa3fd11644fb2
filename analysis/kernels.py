"""Second moments of attention and SwiGLU with random weights: how they map inner products between tokens.

A kernel is a float64 array K [seq, seq]: for activations, K[s, t] is the expectation over random weights of the inner
product of the tokens at positions s and t, divided by the width, so that the diagonal holds variances; for gradients it
is the inner product itself. docs/theory.md derives every formula under the number given here, and says what it leaves
out.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import Polynomial
from numpy.polynomial.hermite_e import hermegauss, hermeval
from numpy.typing import NDArray

Array = NDArray[np.float64]

NUM_TERMS = 20  # of the Hermite series; 16 leave an error below 1e-6 at unit variance
_NODES, _WEIGHTS = hermegauss(64)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()
_LAPLACE = np.exp(np.linspace(-25.0, 20.0, 180))


@dataclass(frozen=True)
class Gains:
    """Says what each matrix multiplies the variance by: fan-in times mean square entry. 1 under init=fan_in."""

    query: float = 1.0
    key: float = 1.0
    value: float = 1.0
    attn_out: float = 1.0
    ffn_up: float = 1.0
    ffn_down: float = 1.0


def normalize(kernel: Array) -> Array:
    """Return the kernel after a norm: cosine similarities, with ones on the diagonal (eq. 2)."""
    return through_norm(kernel, kernel)


def through_norm(gradient: Array, kernel: Array) -> Array:
    """Return a gradient kernel pulled back through the norm of what has `kernel` (eq. 3)."""
    scale = np.sqrt(np.diag(kernel))
    return gradient / np.outer(scale, scale)


def mean_off_diagonal(kernel: Array) -> float:
    """Mean over pairs of different positions; 0 for a single one."""
    seq = len(kernel)
    return float((kernel.sum() - np.trace(kernel)) / max(seq * (seq - 1), 1))


class SwiGLU:
    """down(silu(gate x) * up x) of an x with a given kernel, ones on its diagonal.

    Attributes:
        out: the output's kernel, F(K) elementwise (eq. 4).
    """

    def __init__(self, kernel: Array, gains: Gains) -> None:
        pre = np.sqrt(gains.ffn_up) * _NODES
        activated = pre / (1 + np.exp(-pre))
        factorials = np.cumprod(np.maximum(np.arange(NUM_TERMS), 1.0))
        hermite = hermeval(_NODES, np.diag(factorials**-0.5))  # normalized polynomials [NUM_TERMS, nodes]
        coefficients = hermite @ (_WEIGHTS * activated)
        series = Polynomial([0.0, *(gains.ffn_up * gains.ffn_down * coefficients**2)])
        self.out: Array = series(kernel)
        self.slope: Array = series.deriv()(kernel)

    def backward(self, gradient: Array) -> Array:
        """Return the gradient kernel of x, from that of the output (eq. 5)."""
        return gradient * self.slope


def softmax_moments(spread: Array) -> tuple[Array, Array]:
    """Return moments of softmax weights p over n = 1, ..., seq keys with logits N(0, spread[n - 1]); both [seq].

    Returns:
        concentration E sum_s p_s^2 (eq. 6), and sensitivity E sum_s p_s^2 (1 - 2 p_s + sum_r p_r^2) (eq. 8): the
        squared length of the softmax' Jacobian applied to unit noise.
    """
    n = np.arange(1, len(spread) + 1)
    weight = np.exp(np.sqrt(spread)[:, None] * _NODES)[:, None]  # [seq, 1, nodes]
    decay = np.exp(-_LAPLACE[:, None] * weight)  # [seq, u, nodes]
    # 1/S^k = int u^(k-1) exp(-u S) du / (k-1)! splits an expectation over all keys into factors that see one each.
    single, square, cube, fourth = ((weight**k * decay) @ _WEIGHTS for k in (0, 2, 3, 4))
    others = single ** (n[:, None] - 1)
    two_fewer = others / np.maximum(single, np.finfo(float).tiny)

    def integral(power: int, integrand: Array) -> Array:
        measure = _LAPLACE**power / math.factorial(power - 1)  # one more power: the grid is even in log u
        return np.asarray(np.trapezoid(measure * integrand, np.log(_LAPLACE), axis=1))

    concentration = n * integral(2, square * others)
    cubes = n * integral(3, cube * others)
    squared = n * integral(4, fourth * others) + n * (n - 1) * integral(4, square**2 * two_fewer)
    return concentration, concentration - 2 * cubes + squared


class Attention:
    """Causal self-attention over an x with a given kernel, whose diagonal is constant.

    Args:
        kernel: of x [seq, seq].
        gains: of the four projections.

    Attributes:
        out: the output's kernel (eq. 7).
    """

    def __init__(self, kernel: Array, gains: Gains) -> None:
        variance = float(kernel[0, 0])
        self.gain = gains.value * gains.attn_out
        self.num_keys = np.arange(1, len(kernel) + 1)
        self.seen = np.tril(np.ones_like(kernel))
        self.uniform = self.seen / self.num_keys[:, None]
        self.logit_gain = gains.query * gains.key * variance
        # A softmax ignores what its logits have in common: only the difference between keys spreads them.
        self.apart = 1 - self._among_keys(kernel) / variance
        spread = self.logit_gain * variance * np.clip(self.apart, 0.0, None)
        self.concentration, self.sensitivity = softmax_moments(spread)
        self.out = self.uniform @ kernel @ self.uniform.T
        np.fill_diagonal(self.out, variance * (1 - self.apart * (1 - self.concentration)))
        self.out *= self.gain

    def _among_keys(self, kernel: Array) -> Array:
        """Mean over pairs of different keys that each query sees [seq]; the first query sees one key only."""
        num_pairs = self.num_keys * (self.num_keys - 1)
        sums = np.diag(kernel.cumsum(0).cumsum(1)) - np.diag(kernel).cumsum()
        return np.where(num_pairs > 0, sums / np.maximum(num_pairs, 1), kernel[0, 0])

    def backward(self, gradient: Array) -> Array:
        """Return the gradient kernel of x, from that of the output (eq. 9)."""
        own, p, n = np.diag(gradient), self.concentration, self.num_keys
        two_keys = (1 - p) / np.maximum(n * (n - 1), 1)  # E p_s p_s' for one query; E p_s^2 is p / n
        values = self.uniform.T @ (gradient - np.diag(own)) @ self.uniform
        values += self.seen.T @ (self.seen * (own * two_keys)[:, None]) + np.diag(
            (own * (p / n - two_keys)) @ self.seen
        )
        logits = self.logit_gain * own * self.sensitivity * self.apart
        queries, keys = logits * self.apart, (logits / n) @ self.seen
        return np.asarray(self.gain * (values + np.diag(queries + keys)))
