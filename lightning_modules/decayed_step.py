"""The last part of a step with decoupled decay, for optimizers of ours."""

from torch import Tensor

from core.precision import at_least_fp32


def decay_and_add(parameter: Tensor, decay: float, update: Tensor, factor: float) -> None:
    """Make of a parameter w, in place: (1 - decay) w + factor update, rounded once.

    In bf16 the product alone would be w again wherever decay is below 2^-9.
    """
    wide = at_least_fp32(parameter)  # the parameter itself, unless it is narrower
    wide.mul_(1 - decay).add_(update, alpha=factor)
    if wide is not parameter:
        parameter.copy_(wide)
