"""Draws a model's matrices by the init that its configuration names, or its placement."""

import inspect

from torch import Tensor

from core.errors import ConfigError, require
from core.options import check_arguments
from lightning_modules.argument_errors import as_config_errors, as_error_of_own
from lightning_modules.config import ModelConfig
from lightning_modules.trunk import Trunk
from lightning_modules.width_scaling import UNSCALED, WidthScaling
from spannorm import (
    INITS,
    Init,
    InvalidArgument,
    draw,
    find_placement,
    plain_init,
    standard_deviation,
    start_at_unit_variance,
)
from spannorm.import_path import find


def init_name(config: ModelConfig) -> str:
    """Return the name of the init that takes effect: `default` stands for the one that the placement names.

    Raises:
        ConfigError: an unknown placement.
    """
    if config.init != "default":
        return config.init
    with as_config_errors("model"):
        return find_placement(config.placement).default_init


def resolve_init(config: ModelConfig, num_layers: int | None = None) -> Init:
    """Return the init that a configuration asks for.

    Args:
        config: the model's.
        num_layers: the number of blocks that the init is told; None: the model's.

    Raises:
        ConfigError: an unknown init, or an option that it does not have.
    """
    name, options = init_name(config), config.init_options
    with as_config_errors("model.init_options"):
        if config.init == "default":
            options = {**find_placement(config.placement).default_init_options, **options}
        make = find("init", name, {**INITS, "default": plain_init})  # `default` for the list of what would be valid
        valid = "a function of num_layers that returns an Init, which gives a Matrix its standard deviation"
        require("num_layers" in inspect.signature(make).parameters, "model.init", name, valid)
        check_arguments("model.init_options", make, options, "num_layers")
        with as_error_of_own("model.init", name):
            init = make(num_layers=config.num_layers if num_layers is None else num_layers, **options)
    require(callable(init), "model.init", name, valid)
    return init


def initialize(model: Trunk, scaling: WidthScaling = UNSCALED, num_layers: int | None = None) -> None:
    """Draw every matrix of the model anew, from torch's global generator.

    A sharded model gets the numbers that it would get in one process: each process draws every matrix in full, one
    after the other, and keeps its part.

    Args:
        model: its configuration names the init.
        scaling: how the standard deviations depend on the width beyond what the init says itself.
        num_layers: the number of blocks that the init is told; None: the model's.

    Raises:
        ConfigError: the init gives a matrix a standard deviation that is not positive.
    """
    init, name, options = resolve_init(model.config, num_layers), init_name(model.config), model.config.init_options
    embedded: dict[Tensor, float] = {}
    for matrix in model.matrices():
        try:
            with as_error_of_own("model.init", name):
                std = standard_deviation(init, scaling.at_base(matrix)) * scaling.std_factor(matrix)
        except InvalidArgument as error:
            raise ConfigError("model.init_options", options, "a finite standard deviation > 0") from error
        draw(matrix.weight, std, model.config.init_truncation)
        if matrix.role == "embedding":
            embedded[matrix.weight] = std
    start_at_unit_variance(model, model.embedding_std(embedded))
