"""Every measure by its name. One that joins them is a file beside this, its import and its line here."""

from analysis.anatomy.bfloat16 import Bfloat16
from analysis.anatomy.contribution import Contribution
from analysis.anatomy.critical_batch_size import CriticalBatchSize
from analysis.anatomy.expert_drop import ExpertDrop
from analysis.anatomy.expert_share import ExpertShare
from analysis.anatomy.expert_similarity import ExpertSimilarity
from analysis.anatomy.layer_drop import LayerDrop
from analysis.anatomy.lens import LogitLens, TunedLens
from analysis.anatomy.measure import Comparison, Instrument, Measure
from analysis.anatomy.outliers import Outliers
from analysis.anatomy.pruning import Pruning
from analysis.anatomy.quantization import Quantization
from analysis.anatomy.routing_agreement import RoutingAgreement
from analysis.anatomy.sharpness import Sharpness
from analysis.anatomy.similarity import CrossSimilarity, Similarity

MEASURES: dict[str, type[Measure]] = {
    "layer_drop": LayerDrop,
    "pruning": Pruning,
    "contribution": Contribution,
    "similarity": Similarity,
    "lens": LogitLens,
    "tuned_lens": TunedLens,
    "outliers": Outliers,
    "quantization": Quantization,
    "bfloat16": Bfloat16,
    "sharpness": Sharpness,
    "critical_batch_size": CriticalBatchSize,
    "expert_share": ExpertShare,
    "expert_drop": ExpertDrop,
    "expert_similarity": ExpertSimilarity,
}
"""Measures of one model, in the order of a report."""

COMPARISONS: dict[str, type[Comparison]] = {
    "cross_similarity": CrossSimilarity,
    "routing_agreement": RoutingAgreement,
}
"""Measures of two models together."""

INSTRUMENTS: dict[str, type[Instrument]] = {**MEASURES, **COMPARISONS}


def outcomes() -> dict[str, type[Measure]]:
    """Return which measure finds each scalar that studies and tools.compare can ask for."""
    return {outcome: measure for measure in MEASURES.values() for outcome in measure.outcomes}
