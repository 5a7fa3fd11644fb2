"""Says how stably a run has trained, from its curves alone: spikes, large gradients, tolerance of the learning rate."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

WINDOW = 201
"""Steps of the rolling median that spikes stand out from (2608.30320, section 3.3)."""
SPIKE = 0.1
"""Nats above that median, likewise."""
NOISE = 6.0
"""Standard deviations of the loss from step to step that a spike stands above the median at least: batches of a few
thousand tokens scatter by more than SPIKE without any spike."""
PER_JUMP = 1.4826 / math.sqrt(2)
"""A normal variable's standard deviation over the median size of the difference of two of them."""
CHUNK = 1 << 14
"""Windows that are sorted at once, which bounds the memory."""


def count_spikes(losses: Sequence[float]) -> int | None:
    """Return at how many steps the training loss spikes.

    A spike stands more than SPIKE nats, and more than NOISE deviations, above the median of the WINDOW steps around it.
    The deviation is that of independent losses whose differences from step to step have the median size of those in
    the window: neither the descent nor a spike moves it. A loss that is no finite number is a spike. The first half
    window is the descent from the start, and is left out; at the end the window is the last one.

    Args:
        losses: of every step, in nats per token.

    Returns:
        The number of steps; None of a run shorter than one window.
    """
    values = np.asarray(losses, dtype=np.float64)
    if len(values) < WINDOW:
        return None
    finite = np.where(np.isfinite(values), values, np.inf)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        jumps = np.nan_to_num(np.abs(np.diff(finite)), nan=np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(finite, WINDOW)
    of_jumps = np.lib.stride_tricks.sliding_window_view(jumps, WINDOW - 1)
    half = WINDOW // 2
    spikes = 0
    for start in range(0, len(windows), CHUNK):
        chunk = slice(start, start + CHUNK)
        median = np.median(windows[chunk], axis=1)
        deviation = PER_JUMP * np.median(of_jumps[chunk], axis=1)
        spikes += int(np.sum(_stands_out(windows[chunk, half], median, deviation)))
    # The last half window, against the last median.
    return spikes + int(np.sum(_stands_out(finite[-half:], median[-1], deviation[-1])))


def _stands_out(
    losses: npt.NDArray[np.float64], median: npt.NDArray[np.float64], deviation: npt.NDArray[np.float64]
) -> npt.NDArray[np.bool_]:
    with np.errstate(invalid="ignore"):
        return (losses - median > np.fmax(SPIKE, NOISE * deviation)) | np.isinf(losses)


def spikes_per_10000(losses: Sequence[float]) -> float | None:
    """Return the spikes per 10,000 of the steps that count_spikes looks at; None of a run shorter than one window."""
    spikes = count_spikes(losses)
    return None if spikes is None else 10_000 * spikes / (len(losses) - WINDOW // 2)


def extreme_gradient_norm(norms: Sequence[float]) -> float | None:
    """Return the 99.9th percentile of the gradient norm before clipping; None without a finite one."""
    finite = [norm for norm in norms if np.isfinite(norm)]
    return float(np.percentile(finite, 99.9)) if finite else None


def clipped_share(norms: Sequence[float], limit: float) -> float | None:
    """Return the share of steps whose gradient norm is above the limit, or no number; None without any step."""
    return float(np.mean([not norm <= limit for norm in norms])) if norms else None


def learning_rate_sensitivity(final: Sequence[float | None], start: float) -> float:
    """Return the mean, over learning rates, of the final loss less the best one's (2309.14322, section 2.2).

    A run that ends above the loss at the start, or at no number, counts as one that stayed there. Read it with the
    curves: it is small as well where every rate is bad, and depends on which rates were tried.

    Args:
        final: loss at the end at each rate, in nats per token; None: no finite number.
        start: loss of the untrained model.
    """
    capped = [start if loss is None or not np.isfinite(loss) else min(loss, start) for loss in final]
    return float(np.mean(capped) - min(capped))
