"""Which device a test sees: the CPU alone, unless it carries the marker `gpu`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}


def _no() -> bool:
    return False


def _zero() -> int:
    return 0


def _none(check_available: bool = False) -> None:
    return None


@contextmanager
def without_gpus() -> Iterator[None]:
    """Hide every GPU from torch, from Lightning and from processes that are started inside.

    Most of the project takes a GPU where there is one, and tests compare with figures of a CPU, to the bit.
    """
    with (
        mock.patch.dict(os.environ, HIDDEN),
        mock.patch.object(torch.cuda, "is_available", _no),
        mock.patch.object(torch.cuda, "device_count", _zero),
        mock.patch.object(torch.accelerator, "is_available", _no),
        mock.patch.object(torch.accelerator, "current_accelerator", _none),
    ):
        yield


DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
"""What a test of both devices is parametrized by: so that the code of its GPU case has run somewhere."""
