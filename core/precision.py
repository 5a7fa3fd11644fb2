"""Sums and norms need fp32 at least, whatever precision their terms come in."""

import torch
from torch import Tensor


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Return the tensor in fp32 if it is of a narrower floating type, and as it is otherwise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def describe_narrow_weights(precision: str) -> str | None:
    """Say what a run loses whose weights themselves are narrow.

    Args:
        precision: the Trainer's.

    Returns:
        One line; None: its weights are kept in fp32 or wider.
    """
    if precision not in ("bf16-true", "16-true"):
        return None
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float16
    lost = f"1/{2 / torch.finfo(dtype).eps:.0f}"
    mixed = precision.replace("true", "mixed")
    return (
        f"trainer.precision={precision} keeps the weights in {str(dtype).removeprefix('torch.')}: a step below about "
        f"{lost} of a weight is lost (docs/optimizers.md#low-precision); {mixed} keeps them in fp32."
    )
