"""The base classes of measures."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from analysis.anatomy.findings import Findings
from analysis.anatomy.held_out import HeldOut
from core.errors import require
from core.open_run import OpenRun
from lightning_modules.trunk import Trunk


@dataclass(frozen=True)
class Instrument(ABC):
    """Measures models on held-out data. A subclass is a frozen dataclass whose fields are its options.

    Models are in eval mode, uncompiled, in fp32, and are left as they were found. What goes through them is one batch
    at a time; what is kept of a batch must not grow with them.

    Attributes:
        name: by which it is asked for.
        about: a line on what it says.
        outcomes: the scalars that it finds; by these names studies and tools.compare ask for it.
        slow: whether it runs only where it is asked for by name.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    outcomes: ClassVar[tuple[str, ...]] = ()
    slow: ClassVar[bool] = False


@dataclass(frozen=True)
class Measure(Instrument):
    """Measures one model."""

    @abstractmethod
    def __call__(self, model: Trunk, data: HeldOut) -> Findings:
        """Return what is found."""

    def of_run(self, run: OpenRun) -> Self:
        """Return the measure with what it needs of a run beside its model, such as the optimizer's state."""
        return self

    def fitting_samples(self) -> int:
        """Return how many samples it needs at least of the part for fitting."""
        return 0

    def lacks(self, model: Trunk) -> str | None:
        """Say in words why there is nothing to measure of this model; None: there is."""
        return None


def require_fitting(name: str, needed: int, samples: int, tokens: int) -> None:
    """Raise ConfigError where `tokens` positions bring fewer samples for fitting than a measure needs."""
    valid = f"more: {name} needs {needed} samples for fitting, and there are {samples}"
    require(samples >= needed, "tokens", tokens, valid)


@dataclass(frozen=True)
class Comparison(Instrument):
    """Measures two models together, on the same data."""

    @abstractmethod
    def __call__(self, first: Trunk, second: Trunk, data: HeldOut) -> Findings:
        """Return what is found."""

    def lacks(self, first: Trunk, second: Trunk) -> str | None:
        """Say in words why these two cannot be compared; None: they can."""
        return None


def other_positions(first: Trunk, second: Trunk) -> str | None:
    """Say that two models make other positions of the same samples, as of other patches; None: they do not."""
    example = first.example(1, 1, torch.Generator().manual_seed(0))
    ours, theirs = (model.count(example).positions for model in (first, second))
    return None if ours == theirs else f"it makes {theirs} positions of a sample, the first makes {ours}"
