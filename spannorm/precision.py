"""Small coefficients are computed in fp32 whatever the streams are in: in bf16 their differences come to nothing."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """Return x in fp32, or in fp64 if it is so."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Return a context in which products on the device of x are computed in the type of their factors."""
    return torch.autocast(x.device.type, enabled=False)
