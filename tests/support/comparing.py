"""What has to be equal between two runs."""

from typing import Any

import torch


def assert_equal(ours: Any, theirs: Any, where: str) -> None:
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, dict | list):
        ours, theirs = (dict(enumerate(x)) if isinstance(x, list) else x for x in (ours, theirs))
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_equal(ours[key], theirs[key], f"{where}.{key}")
    else:
        assert ours == theirs, where
