"""Sums and norms need fp32 at least, whatever precision their terms come in."""

import torch
from torch import Tensor


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Return the tensor in fp32 if it is of a narrower floating type, and as it is otherwise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
