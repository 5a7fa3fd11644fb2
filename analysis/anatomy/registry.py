"""Every measure by its name. One that joins them is a file beside this, its import and its line here."""

from analysis.anatomy.contribution import Contribution
from analysis.anatomy.layer_drop import LayerDrop
from analysis.anatomy.lens import LogitLens, TunedLens
from analysis.anatomy.measure import Comparison, Instrument, Measure
from analysis.anatomy.pruning import Pruning
from analysis.anatomy.similarity import CrossSimilarity, Similarity

MEASURES: dict[str, type[Measure]] = {
    "layer_drop": LayerDrop,
    "pruning": Pruning,
    "contribution": Contribution,
    "similarity": Similarity,
    "lens": LogitLens,
    "tuned_lens": TunedLens,
}
"""Measures of one model, in the order of a report."""

COMPARISONS: dict[str, type[Comparison]] = {"cross_similarity": CrossSimilarity}
"""Measures of two models together."""

INSTRUMENTS: dict[str, type[Instrument]] = {**MEASURES, **COMPARISONS}


def outcomes() -> dict[str, type[Measure]]:
    """Return which measure finds each scalar that studies and tools.compare can ask for."""
    return {outcome: measure for measure in MEASURES.values() for outcome in measure.outcomes}
