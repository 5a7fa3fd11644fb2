"""Initializations, orthogonal to placement: each says the standard deviation of every matrix.

    init         base   times                                                             source
    plain        std    1                                                                 GPT-2's 0.02 by default
    fan_in       F      1                                                                 unit variance in, and out
    megatron     std    1/sqrt(2L) on O and D                                             1909.08053
    scale_init   F      1/sqrt(L) on O and D; L and the matrices selectable               2601.22580, reconstructed
    deepnorm     X      (8L)^(-1/4) on V, O, U and D                                      2203.00555, figure 2
    b2t          X      1/sqrt(L) on Q, K, V, O, U and D                                  2206.00330, reconstructed
    subln        X      sqrt(ln 2L) on V, O, U and D                                      2210.06423
    deepscalelm  F      sqrt(2/L) on O and D; 1/sqrt(E silu(z)^2) on D; r^(-1/4) on V, O  2403.09635, partly derived

    L: number of blocks. Q, K, V, O: attention's query, key, value and output matrices; U: the FFN's gate and up
    matrices, D: its down matrix, and those of experts alike. F: 1/sqrt(fan_in). X: sqrt(2 / (fan_in + fan_out))
    (Xavier) on these; F on embedding and head.

All draws are normal with mean 0; `model.init_truncation` draws anew what is further out than so many standard
deviations. An embedding lookup has fan-in 1. The router always draws with 0.02, so that the
experts start nearly balanced whatever the init. Norm gains start at 1 and biases at 0.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from core.errors import ConfigError, lookup, suggest
from core.options import check_arguments
from lightning_modules.config import ModelConfig
from lightning_modules.layers.matrices import Matrix
from lightning_modules.placements.registry import PLACEMENTS
from lightning_modules.sharding import part_of
from lightning_modules.transformer import Transformer
from lightning_modules.width_scaling import UNSCALED, WidthScaling

Init = Callable[[Matrix], float]
"""The standard deviation that a matrix is drawn with."""

ROUTER_STD = 0.02
TARGETS = ("attn_out", "value", "ffn_up", "ffn_down")
OUTPUTS = ("attn_out", "ffn_down")
"""The two matrices that end a residual branch."""
BLOCK = ("query", "key", *TARGETS)
SILU_POWER = 0.3557755
"""E silu(z)^2 of a standard normal z."""


def _fan_in(matrix: Matrix) -> float:
    return matrix.fan_in**-0.5


def _xavier(matrix: Matrix) -> float:
    """Keeps the variance on the way forward and back, on average (Glorot and Bengio 2010); fan_in outside blocks."""
    return (2 / (matrix.fan_in + matrix.fan_out)) ** 0.5 if matrix.role in BLOCK else _fan_in(matrix)


def _fairseq(matrix: Matrix) -> float:
    """What fairseq's attention and torch's linear layers draw with."""
    if matrix.role in ("query", "key", "value"):
        return _xavier(matrix) / 2**0.5
    return (3 * matrix.fan_in) ** -0.5 if matrix.role in ("ffn_up", "ffn_down") else _xavier(matrix)


def _small(matrix: Matrix) -> float:
    """sqrt(2 / (5 dim)) (1910.05895), dim the width of the stream that the matrix reads or writes."""
    dim = matrix.fan_out if matrix.role in ("embedding", *OUTPUTS) else matrix.fan_in
    return (2 / (5 * dim)) ** 0.5


def _scaled(base: Init, scale: float, targets: Collection[str]) -> Init:
    return lambda matrix: base(matrix) * (scale if matrix.role in targets else 1.0)


def _with(init: Init, stds: Mapping[str, float | None]) -> Init:
    """`init`, except for the roles that have a standard deviation of their own."""
    own = {role: std for role, std in stds.items() if std is not None}
    return lambda matrix: own[matrix.role] if matrix.role in own else init(matrix)


def plain(num_layers: int, std: float = 0.02, embedding_std: float | None = None) -> Init:
    """The same standard deviation everywhere.

    Args:
        num_layers: number of blocks.
        std: of all matrices.
        embedding_std: of the embedding; None: std.
    """
    return _with(lambda matrix: std, {"embedding": embedding_std})


def fan_in(num_layers: int) -> Init:
    """1/sqrt(fan_in): every product keeps the variance of its input."""
    return _fan_in


def megatron(num_layers: int, std: float | None = 0.02, head: Literal["std", "fan_in"] = "std") -> Init:
    """plain, with the two matrices that end a residual branch times 1/sqrt(2L) (1909.08053).

    Args:
        num_layers: number of blocks.
        std: of all other matrices; None: sqrt(2 / (5 dim)), as HybridNorm has it (2503.04598).
        head: what an untied head is drawn with: std, or 1/sqrt(dim) (fan_in).
    """
    base = _small if std is None else plain(num_layers, std)
    scaled = _scaled(base, (2 * num_layers) ** -0.5, OUTPUTS)
    return (lambda matrix: _fan_in(matrix) if matrix.role == "head" else scaled(matrix)) if head == "fan_in" else scaled


def scale_init(
    num_layers: int, factor: Literal["blocks", "sublayers"] = "blocks", targets: Sequence[str] = OUTPUTS
) -> Init:
    """ScaleInit (2601.22580): fan_in, with the target matrices times 1/sqrt(L); each branch then has variance O(1/L).

    Reconstructed: the paper's text could not be had. Whether L counts blocks or sublayers, and which matrices are
    scaled, is therefore a parameter.

    Args:
        num_layers: number of blocks.
        factor: L is the number of blocks, or of sublayers (twice as many).
        targets: which of attn_out, value, ffn_up and ffn_down to scale.
    """
    for target in targets:
        if target not in TARGETS:
            raise ConfigError("model.init_options.targets", list(targets), f"a list of {', '.join(TARGETS)}")
    return _scaled(_fan_in, (num_layers if factor == "blocks" else 2 * num_layers) ** -0.5, targets)


def deepnorm(num_layers: int) -> Init:
    """Xavier with the gain (8L)^(-1/4) on values, outputs and FFN (2203.00555, the decoder-only case)."""
    return _scaled(_xavier, (8 * num_layers) ** -0.25, TARGETS)


def b2t(num_layers: int, base: Literal["xavier", "fairseq"] = "xavier") -> Init:
    """Xavier times 1/sqrt(L) on every matrix of the blocks (2206.00330).

    The paper scales all but the norms; that its base is Xavier, and that embedding and head are left alone, is
    reconstructed.

    Args:
        num_layers: number of blocks.
        base: xavier, or fairseq for what the authors' code starts from: Xavier / sqrt(2) on Q, K and V, Xavier on O,
            and 1/sqrt(3 fan_in) on U and D (their draws are uniform, ours normal with the same standard deviation).
    """
    return _scaled(_fairseq if base == "fairseq" else _xavier, num_layers**-0.5, BLOCK)


def subln(num_layers: int) -> Init:
    """Xavier with the gain sqrt(ln 2L) on values, outputs and FFN (2210.06423, the decoder-only case)."""
    return _scaled(_xavier, math.log(2 * num_layers) ** 0.5, TARGETS)


def deepscalelm(num_layers: int, correlation: float = 1.0) -> Init:
    """DeepScaleLM's unit-variance branches and their weight 2/L (2403.09635).

    Known: queries and keys with 1/sqrt(fan_in), and branches of variance 2/L. Derived here: the value and output
    matrices share the factor 1/sqrt(r) that undoes attention's averaging, and a SwiGLU's down matrix undoes its hidden
    layer's power E silu(z)^2 (the paper has ReLU). Left out: the paper multiplies the skip connections by
    sqrt(1 - 2/L), which no init can.

    Args:
        num_layers: number of blocks.
        correlation: r, the mean correlation of two tokens at attention's input: the share of the values' variance that
            is left after averaging over tokens. The paper computes it for each layer from the data.
    """
    if not 0 < correlation <= 1:
        raise ConfigError("model.init_options.correlation", correlation, "a number in (0, 1]")
    attention = _scaled(_fan_in, correlation**-0.25, ("value", "attn_out"))
    return _scaled(_scaled(attention, SILU_POWER**-0.5, ["ffn_down"]), min(1.0, 2 / num_layers) ** 0.5, OUTPUTS)


INITS: dict[str, Callable[..., Init]] = {
    "plain": plain,
    "fan_in": fan_in,
    "megatron": megatron,
    "scale_init": scale_init,
    "deepnorm": deepnorm,
    "b2t": b2t,
    "subln": subln,
    "deepscalelm": deepscalelm,
}


def resolve_init(config: ModelConfig) -> Init:
    """The init that a configuration asks for; `default` is what its placement names.

    Raises:
        ConfigError: an unknown init, or an option that it does not have.
    """
    name, options = config.init, config.init_options
    if name == "default":
        placement = lookup("model.placement", config.placement, PLACEMENTS)
        name, options = placement.default_init, {**placement.default_init_options, **options}
    if name not in INITS:
        raise ConfigError("model.init", name, suggest(name, [*INITS, "default"]))
    check_arguments("model.init_options", INITS[name], options, "num_layers")
    return INITS[name](config.num_layers, **options)


@torch.no_grad()
def initialize(model: Transformer, scaling: WidthScaling = UNSCALED) -> None:
    """Draw every matrix of the model anew, from torch's global generator.

    A sharded model gets the numbers that it would get in one process: each process draws every matrix in full, one
    after the other, and keeps its part.

    Args:
        model: its configuration names the init.
        scaling: how the standard deviations depend on the width beyond what the init says itself.
    """
    init = resolve_init(model.config)
    for matrix in model.matrices():
        std = ROUTER_STD if matrix.role == "router" else init(scaling.at_base(matrix))
        if not math.isfinite(std) or std <= 0:  # of 0, no gradient would reach what comes before it
            raise ConfigError("model.init_options", model.config.init_options, "a finite standard deviation > 0")
        weight, std = matrix.weight, std * scaling.std_factor(matrix)
        if matrix.role == "embedding":
            model.unit_embedding(std)
        if isinstance(weight, DTensor):
            whole = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            weight.copy_(part_of(_draw(whole, std, model.config.init_truncation), weight))
        else:
            _draw(weight, std, model.config.init_truncation)


def _draw(weight: torch.Tensor, std: float, truncation: float | None) -> torch.Tensor:
    """In place, from the normal distribution, or what of it lies within `truncation` standard deviations."""
    if truncation is None:
        return nn.init.normal_(weight, std=std)
    return nn.init.trunc_normal_(weight, std=std, a=-truncation * std, b=truncation * std)
