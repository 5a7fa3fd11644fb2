"""Custom operators against the rules that torch has for them."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch


def opcheck(operator: Any, arguments: Sequence[Any]) -> None:
    """Run torch.library.opcheck, but for a warning of torch 2.14 about its own copies of the arguments.

    It looks at the gradient of copies that are no leaves, which the warning, an error in these tests, is about.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf Tensor")
        torch.library.opcheck(operator, tuple(arguments))
