"""Says how stably a run has trained, from the curves and the configuration in its folder."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from analysis.stability import clipped_share, extreme_gradient_norm, spikes_per_10000
from core.untrusted import read_yaml
from tools.curves import Curve

MAX_BLOCKS = 1024
COLUMN_NAMES = {
    "spikes": "spikes per 10,000 steps",
    "grad_norm_p999": "gradient norm, p99.9",
    "clipped": "steps clipped",
    "largest_activation": "largest activation",
}
"""What the figures of Stability are called in tables."""


class Stability(NamedTuple):
    """Figures that two runs can be compared by; None: the run has not logged what it takes.

    Attributes:
        spikes: of the training loss, per 10,000 steps (analysis/stability.py); None too of a run of less than 201
            steps, or one that did not log each.
        grad_norm_p999: 99.9th percentile of the gradient norm before clipping.
        clipped: share of the logged steps whose gradient was clipped; None without clipping, and where it is each entry
            that is clipped, of which the norm says nothing.
        largest_activation: magnitude in any block's hidden state, at the steps when it was looked at; infinite where
            one was no finite number.
    """

    spikes: float | None
    grad_norm_p999: float | None
    clipped: float | None
    largest_activation: float | None


def stability(folder: Path, curves: Mapping[str, Curve]) -> Stability:
    """Return the figures of a run.

    Args:
        folder: the run's, whose config.yaml is read as data.
        curves: what it has logged, as tools.curves reads it.
    """
    steps, losses = curves.get("train/loss", ([], []))
    every_step = bool(steps) and steps == list(range(steps[0], steps[0] + len(steps)))
    norms = curves.get("optim/grad_norm", ([], []))[1]
    limit = _clip_limit(folder)
    blocks = (*range(1, MAX_BLOCKS), "worst")
    activations = (curves.get(f"signal/block_{block}/max", ([], []))[1] for block in blocks)
    largest = [value if math.isfinite(value) else math.inf for values in activations for value in values]
    return Stability(
        spikes=spikes_per_10000(losses) if every_step else None,
        grad_norm_p999=extreme_gradient_norm(norms),
        clipped=clipped_share(norms, limit) if limit else None,
        largest_activation=max(largest, default=None),
    )


def _clip_limit(folder: Path) -> float | None:
    """Return the norm that the run's configuration clips at; None: at none."""
    config = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else None
    trainer = config.get("trainer") if isinstance(config, dict) else None
    if not isinstance(trainer, dict) or trainer.get("gradient_clip_algorithm") == "value":
        return None
    limit = trainer.get("gradient_clip_val")
    return float(limit) if isinstance(limit, int | float) and 0 < limit < math.inf else None
