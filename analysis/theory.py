"""Predicted signal propagation at initialization: the recurrences of docs/theory.md.

A scheme carries the hidden state's kernel (analysis/kernels.py) through one block, and a gradient's kernel back.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from analysis.kernels import (
    Array,
    Attention,
    Gains,
    SwiGLU,
    mean_off_diagonal,
    normalize,
    through_norm,
)
from core.precision import at_least_fp32
from lightning_modules.transformer import Transformer
from lightning_modules.trunk import Block, Trunk


@dataclass(frozen=True)
class Prediction:
    """One block's predicted figures; variance, ratios and cosine as in BlockSignal.

    Attributes:
        hidden_gradient: gradient norm of the hidden state after this block over that after the last one.
        skip_gradient: likewise, counting only the path through skip connections and norms.
    """

    variance: float
    attn_ratio: float
    ffn_ratio: float
    cosine: float
    hidden_gradient: float
    skip_gradient: float


class Trace(NamedTuple):
    """One block's kernels: state before, attention, the sum after it, FFN, the sum after it, state after."""

    before: Array
    attn: Attention
    attn_sum: Array
    ffn: SwiGLU
    ffn_sum: Array
    after: Array


class Scheme(Protocol):
    """A block equation on kernels."""

    final_norm: bool

    def forward(self, x: Array, gains: Gains, is_first: bool) -> Trace: ...

    def backward(self, gradient: Array, trace: Trace) -> Array:
        """Return the gradient kernel of the state before, from that of the state after."""

    def skip(self, trace: Trace) -> float:
        """Return what the skip path multiplies a gradient's variance by."""


class PreNorm:
    """y = x + A(N x);  out = y + F(N y)   (eq. 10)"""

    final_norm = True

    def forward(self, x: Array, gains: Gains, is_first: bool) -> Trace:
        attn = Attention(normalize(x), gains)
        attn_sum = x + attn.out
        ffn = SwiGLU(normalize(attn_sum), gains)
        ffn_sum = attn_sum + ffn.out
        return Trace(x, attn, attn_sum, ffn, ffn_sum, ffn_sum)

    def backward(self, gradient: Array, trace: Trace) -> Array:
        gradient = gradient + through_norm(trace.ffn.backward(gradient), trace.attn_sum)
        return gradient + through_norm(trace.attn.backward(gradient), trace.before)

    def skip(self, trace: Trace) -> float:
        return 1.0


class PostNorm:
    """y = N(a x + A(x));  out = N(a y + F(y)), with a = 1, or DeepNorm's   (eq. 11)"""

    final_norm = False

    def __init__(self, alpha: float = 1.0) -> None:
        self.square = alpha**2

    def forward(self, x: Array, gains: Gains, is_first: bool) -> Trace:
        attn = Attention(x, gains)
        attn_sum = self.square * x + attn.out
        y = normalize(attn_sum)
        ffn = SwiGLU(y, gains)
        ffn_sum = self.square * y + ffn.out
        return Trace(x, attn, attn_sum, ffn, ffn_sum, normalize(ffn_sum))

    def backward(self, gradient: Array, trace: Trace) -> Array:
        gradient = through_norm(gradient, trace.ffn_sum)
        gradient = through_norm(self.square * gradient + trace.ffn.backward(gradient), trace.attn_sum)
        return self.square * gradient + trace.attn.backward(gradient)

    def skip(self, trace: Trace) -> float:
        return self.square**2 / (_variance(trace.attn_sum) * _variance(trace.ffn_sum))


class SpanNorm:
    """y = N(x + A(x'));  out = N(x + F(y)), x' = N0(x) in the first block   (eq. 12)"""

    final_norm = False

    def forward(self, x: Array, gains: Gains, is_first: bool) -> Trace:
        attn = Attention(normalize(x) if is_first else x, gains)
        attn_sum = x + attn.out
        ffn = SwiGLU(normalize(attn_sum), gains)
        ffn_sum = x + ffn.out
        return Trace(x, attn, attn_sum, ffn, ffn_sum, normalize(ffn_sum))

    def backward(self, gradient: Array, trace: Trace) -> Array:
        gradient = through_norm(gradient, trace.ffn_sum)
        inner = through_norm(trace.ffn.backward(gradient), trace.attn_sum)
        return gradient + inner + trace.attn.backward(inner)

    def skip(self, trace: Trace) -> float:
        return 1 / _variance(trace.ffn_sum)


SCHEMES: dict[str, Callable[[int], Scheme]] = {
    "prenorm": lambda num_layers: PreNorm(),
    "postnorm": lambda num_layers: PostNorm(),
    "spannorm": lambda num_layers: SpanNorm(),
    "deepnorm": lambda num_layers: PostNorm((2 * num_layers) ** 0.25),
}


def predict(
    scheme: Scheme, gains: Sequence[Gains], seq_len: int, embedding: float = 1.0, repeats: float = 0.0
) -> list[Prediction]:
    """Return the figures of every block, first to last.

    Args:
        scheme: the block equation.
        gains: of each block's matrices.
        seq_len: number of positions.
        embedding: variance of the embedding output.
        repeats: probability that two positions hold the same token.
    """
    state = embedding * (repeats + (1 - repeats) * np.eye(seq_len))
    traces: list[Trace] = []
    for index, block_gains in enumerate(gains):
        traces.append(scheme.forward(state, block_gains, is_first=index == 0))
        state = traces[-1].after
    gradient = np.eye(seq_len)  # of different tokens: uncorrelated, as their targets are
    if scheme.final_norm:
        gradient = through_norm(gradient, state)
    last, skip = float(np.trace(gradient)), 1.0
    predictions = []
    for trace in reversed(traces):
        before = _variance(trace.before)
        predictions.append(
            Prediction(
                variance=_variance(trace.after),
                attn_ratio=_variance(trace.attn.out) / before,
                ffn_ratio=_variance(trace.ffn.out) / before,
                cosine=mean_off_diagonal(normalize(trace.after)),
                hidden_gradient=float(np.sqrt(np.trace(gradient) / last)),
                skip_gradient=skip**0.5,
            )
        )
        gradient = scheme.backward(gradient, trace)
        skip *= scheme.skip(trace)
    return predictions[::-1]


def predict_model(model: Trunk, seq_len: int) -> list[Prediction] | None:
    """Call `predict` for an initialized model and tokens drawn uniformly; None where there is no theory."""
    config = model.config
    covered = config.placement in SCHEMES and config.ffn == "dense" and config.norm in ("rmsnorm", "layernorm")
    if not covered or not config.causal or config.placement_options or model.branch_multiplier != 1:
        return None
    assert isinstance(model, Transformer), "tokens alone are read causally"
    return predict(
        SCHEMES[config.placement](config.num_layers),
        [read_gains(block) for block in model.blocks if isinstance(block, Block)],
        seq_len,
        _mean_square(model.embedding.weight),
        1 / model.embedding.num_embeddings,
    )


def read_gains(block: Block) -> Gains:
    """Return the gains of a dense block's matrices, from their entries; ffn_up is the mean of gate's and up's."""
    gains: dict[str, list[float]] = defaultdict(list)
    for matrix in (*block.attn.matrices(), *block.ffn.matrices()):
        gains[matrix.role].append(_mean_square(matrix.weight) * matrix.fan_in)
    return Gains(**{role: sum(values) / len(values) for role, values in gains.items()})


def _mean_square(weight: Tensor) -> float:
    return float(at_least_fp32(weight.detach()).square().mean())


def _variance(kernel: Array) -> float:
    return float(np.trace(kernel)) / len(kernel)
