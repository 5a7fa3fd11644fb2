"""Counts the calls for which a host would wait for its device, on any machine."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

METHODS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__")
FACTORIES = ("tensor", "as_tensor")
"""With a device: Python's numbers are copied to it at once."""
OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount")
HOST_ONLY = ("datamodules", "torch/utils/data")
"""Who works on the host: the batch is not on the device yet."""


class Counting(TorchDispatchMode):
    """Notes them as {(how, where): times}; `where` is the innermost of the callers that is not torch's own.

    Attributes:
        on: whether anything is noted.
        found: what was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on, self.found = False, Counter[tuple[str, str]]()

    def note(self, how: str) -> None:
        """Note a call that is under way, unless it is on a tensor of the host."""
        frame, where = sys._getframe(1), ""
        while self.on and frame is not None:
            path = frame.f_code.co_filename
            if any(part in path for part in HOST_ONLY):
                return
            if not where and path != __file__ and "/torch/" not in path and "/unittest/" not in path:
                where = f"{Path(path).name}:{frame.f_lineno}"
            frame = frame.f_back  # type: ignore[assignment]
        if self.on:
            self.found[how, where] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        of_unknown_length = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in OPERATORS or by_mask or of_unknown_length:
            self.note(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[Counting]:
    """Give the counter, which is off at first."""
    counter = Counting()

    def noting(name: str) -> Any:
        plain = getattr(Tensor, name)

        def method(self: Tensor, *arguments: Any, **options: Any) -> Any:
            on, name_of = counter.on, name
            counter.note(name_of)
            counter.on = False  # what torch does for it is the same call
            try:
                return plain(self, *arguments, **options)
            finally:
                counter.on = on

        return method

    def of_the_host(plain: Any, how: str, where: Callable[..., bool]) -> Any:
        def function(*arguments: Any, **options: Any) -> Any:
            if where(*arguments[1:], *options.values()):
                counter.note(how)
            return plain(*arguments, **options)

        return function

    # By name: where the device is the CPU as well, others move nothing.
    to = of_the_host(Tensor.to, "to", lambda *places: "cpu" in [place for place in places if isinstance(place, str)])
    patches = [mock.patch.object(Tensor, name, noting(name)) for name in METHODS]
    patches.append(mock.patch.object(Tensor, "to", to))
    for name in FACTORIES:
        made = of_the_host(
            getattr(torch, name), name, lambda *given: any(isinstance(x, str | torch.device) for x in given)
        )
        patches.append(mock.patch.object(torch, name, made))
    for patch in patches:
        patch.start()
    try:
        with counter:
            yield counter
    finally:
        for patch in patches:
            patch.stop()
