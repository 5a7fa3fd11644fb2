"""Intervals by bootstrap over documents, of one model's figures and of the differences between two models'."""

import math
from typing import NamedTuple

import numpy as np

from analysis.anatomy.held_out import Sums

RESAMPLES, LEVEL = 2000, 0.95
FEWEST = 8
"""Documents below which there is no interval: the fewer, the narrower than they should be, and of one without width."""


class Interval(NamedTuple):
    """A figure, and the bounds between which it is in 95 % of the resamples (percentiles).

    The bounds are nan where there are fewer than FEWEST documents.
    """

    value: float
    low: float
    high: float


class Resampled:
    """The documents of held-out data, drawn anew with replacement many times; each figure is taken of the same draws.

    Documents are what is drawn, as the tokens of one depend on each other, and images; a figure is a sum over
    documents, over the tokens in them. So models that are measured on the same data are compared pair by pair.

    Args:
        targets: number of each document's, [documents].
    """

    def __init__(self, targets: Sums) -> None:
        self.targets = targets
        documents = len(targets)
        generator = np.random.default_rng(0)
        self.draws = generator.multinomial(documents, np.full(documents, 1 / documents), RESAMPLES).astype(np.float64)

    def intervals(self, sums: Sums, counts: Sums | None = None) -> list[Interval]:
        """Return the interval of each figure.

        Args:
            sums: of each document, [figures, documents]: analysis.anatomy.findings.Findings.by_document.
            counts: what they are over, [documents]; None: the targets.
        """
        counts = self.targets if counts is None else counts
        values = sums.sum(1) / counts.sum()
        if len(counts) < FEWEST:
            return [Interval(float(value), math.nan, math.nan) for value in values]
        drawn = (self.draws @ sums.T) / (self.draws @ counts)[:, None]
        tail = 100 * (1 - LEVEL) / 2
        low, high = np.percentile(drawn, [tail, 100 - tail], axis=0)
        return [Interval(*map(float, found)) for found in zip(values, low, high, strict=True)]

    def differences(
        self, sums: Sums, others: Sums, counts: Sums | None = None, other_counts: Sums | None = None
    ) -> list[Interval]:
        """Return the interval of each figure less that of another model, document by document."""
        if counts is not None and other_counts is not None:
            others = others * (counts / other_counts)
        return self.intervals(sums - others, counts)
