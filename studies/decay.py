"""The gradient on its way back through a run's model at initialization, measured where the study runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from studies.composing import composing_anew

LARGEST_BUILT = 50_000_000
"""Parameters of a model that is built anew for it."""
PerBlock = Annotated[list[float], Field(min_length=1, max_length=4096)]


@dataclass(frozen=True)
class Decay:
    """Gradient norm of the hidden state after each block, over that after the last one.

    Attributes:
        measured: by block, of random tokens; see tools.propagation.
        predicted: by docs/theory.md; None: there is no theory of this model.
    """

    measured: PerBlock
    predicted: PerBlock | None = None


def measure(overrides: Sequence[str], seed: int) -> Decay:
    """Build the model that train.py builds under these overrides, which are the user's own, and measure it."""
    from tools.propagation import report

    with composing_anew():
        result = report([*overrides, f"seed={seed}"])
    unit = result.signals[-1].hidden_gradient or float("nan")
    predicted = result.predicted("hidden_gradient")
    return Decay(
        [_rounded(signal.hidden_gradient / unit) for signal in result.signals],
        None if predicted is None else [_rounded(value / unit) for value in predicted],
    )


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
