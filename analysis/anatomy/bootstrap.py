"""Intervals by bootstrap over documents, of one model's figures and of the differences between two models'."""

import math
from typing import NamedTuple

import numpy as np

from analysis.anatomy.text import Sums

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
    """The documents of a text, drawn anew with replacement many times; each figure is taken of the same draws.

    Documents are what is drawn, as the tokens of one depend on each other; a figure is a sum over documents, over the
    tokens in them. So models that are measured on the same text are compared pair by pair.

    Args:
        tokens: number of each document's, [documents].
    """

    def __init__(self, tokens: Sums) -> None:
        self.tokens = tokens
        documents = len(tokens)
        generator = np.random.default_rng(0)
        self.draws = generator.multinomial(documents, np.full(documents, 1 / documents), RESAMPLES).astype(np.float64)

    def intervals(self, sums: Sums) -> list[Interval]:
        """Return the interval of each figure.

        Args:
            sums: of each document, [figures, documents]: analysis.anatomy.findings.Findings.by_document.
        """
        values = sums.sum(1) / self.tokens.sum()
        if len(self.tokens) < FEWEST:
            return [Interval(float(value), math.nan, math.nan) for value in values]
        drawn = (self.draws @ sums.T) / (self.draws @ self.tokens)[:, None]
        tail = 100 * (1 - LEVEL) / 2
        low, high = np.percentile(drawn, [tail, 100 - tail], axis=0)
        return [Interval(*map(float, found)) for found in zip(values, low, high, strict=True)]

    def differences(self, sums: Sums, others: Sums) -> list[Interval]:
        """Return the interval of each figure less that of another model, document by document."""
        return self.intervals(sums - others)
