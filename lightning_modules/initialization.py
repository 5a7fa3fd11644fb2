"""Initializations, orthogonal to placement: each says the standard deviation of every matrix.

    init        base             residual branches' output matrices (L = number of blocks)
    plain       std              as the base                        GPT-2's 0.02 by default
    fan_in      1/sqrt(fan_in)   as the base                        unit variance in, unit variance out
    megatron    std              x 1/sqrt(2L)                       1909.08053
    scale_init  1/sqrt(fan_in)   x 1/sqrt(L), targets selectable    2601.22580, reconstructed

All draws are normal with mean 0. An embedding lookup has fan-in 1. The router always draws with 0.02, so that the
experts start nearly balanced whatever the init. Norm gains start at 1 and biases at 0.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn

from core.errors import ConfigError, lookup, suggest
from core.options import check_arguments
from lightning_modules.config import ModelConfig
from lightning_modules.layers.matrices import Matrix
from lightning_modules.placements.registry import PLACEMENTS
from lightning_modules.transformer import Transformer
from lightning_modules.width_scaling import UNSCALED, WidthScaling

Init = Callable[[Matrix], float]
"""The standard deviation that a matrix is drawn with."""

ROUTER_STD = 0.02
TARGETS = ("attn_out", "value", "ffn_up", "ffn_down")


def plain(num_layers: int, std: float = 0.02) -> Init:
    """The same standard deviation everywhere."""
    return lambda matrix: std


def fan_in(num_layers: int) -> Init:
    """1/sqrt(fan_in): every product keeps the variance of its input."""
    return lambda matrix: matrix.fan_in**-0.5


def megatron(num_layers: int, std: float = 0.02) -> Init:
    """plain, with the two matrices that end a residual branch times 1/sqrt(2L) (1909.08053)."""
    scale = (2 * num_layers) ** -0.5
    return lambda matrix: std * (scale if matrix.role in ("attn_out", "ffn_down") else 1.0)


def scale_init(
    num_layers: int,
    factor: Literal["blocks", "sublayers"] = "blocks",
    targets: Sequence[str] = ("attn_out", "ffn_down"),
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
    scale = (num_layers if factor == "blocks" else 2 * num_layers) ** -0.5
    return lambda matrix: matrix.fan_in**-0.5 * (scale if matrix.role in targets else 1.0)


INITS: dict[str, Callable[..., Init]] = {
    "plain": plain,
    "fan_in": fan_in,
    "megatron": megatron,
    "scale_init": scale_init,
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

    Args:
        model: its configuration names the init.
        scaling: how the standard deviations depend on the width beyond what the init says itself.
    """
    init = resolve_init(model.config)
    for matrix in model.matrices():
        std = ROUTER_STD if matrix.role == "router" else init(scaling.at_base(matrix))
        if not math.isfinite(std) or std < 0:
            raise ConfigError("model.init_options", model.config.init_options, "a finite standard deviation >= 0")
        nn.init.normal_(matrix.weight, std=std * scaling.std_factor(matrix))
