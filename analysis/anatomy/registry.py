"""Every measure by its name. One that joins them is a file beside this, its import and its line here."""

from analysis.anatomy.layer_drop import LayerDrop
from analysis.anatomy.measure import Comparison, Measure

MEASURES: dict[str, type[Measure]] = {measure.name: measure for measure in (LayerDrop,)}

COMPARISONS: dict[str, type[Comparison]] = {}
