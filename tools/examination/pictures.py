"""Draws what findings ask for: curves of all runs in one panel, a heat map for each run."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.anatomy.bootstrap import Interval
from analysis.anatomy.findings import Findings, Picture
from studies.figures import drawable, drawn_label, log_scale, pyplot
from tools.picture import save_picture

MAX_PANELS = 4
"""Heat maps side by side."""
SMALL = 1e-3
"""Values below it are drawn on a linear scale where some are not positive."""
PER_INCH = 12
"""Characters of a heading that fit."""
STYLES = ("-", "--", ":", "-.")


def draw(
    picture: Picture,
    found: Mapping[str, Findings],
    intervals: Mapping[str, Mapping[str, Sequence[Interval]]],
    output: Path,
) -> None:
    """Draw one picture of what was found of several runs.

    Args:
        picture: which.
        found: by the run's label; each has what the picture is of.
        intervals: by label, of the curves that have some, by name.
        output: the file.
    """
    plt = pyplot()
    are_curves = picture.kind == "curves"
    figure = _curves(plt, picture, found, intervals) if are_curves else _heat_maps(plt, picture, found)
    save_picture(figure, output, dpi=110)
    plt.close(figure)


def _curves(
    plt: Any,
    picture: Picture,
    found: Mapping[str, Findings],
    intervals: Mapping[str, Mapping[str, Sequence[Interval]]],
) -> Any:
    size = (7, 4)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    positive = True
    for number, (label, findings) in enumerate(found.items()):
        for name, style in zip(picture.of, STYLES * len(picture.of), strict=False):
            curve = findings.curves[name]
            words = label if len(picture.of) == 1 else f"{label}, {name.replace('_', ' ')}"
            values = drawable(curve.values)
            positive = positive and all(value > 0 for value in values if not math.isnan(value))
            axes.plot(curve.places, values, style, color=f"C{number}", marker=".", label=drawn_label(words))
            bounds = intervals.get(label, {}).get(name)
            if bounds:
                low, high = (drawable([getattr(bound, end) for bound in bounds]) for end in ("low", "high"))
                axes.fill_between(curve.places, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
            axes.set_xlabel(curve.over)
    axes.set_title(_heading(picture, size), fontsize=10)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if picture.log:
        log_scale(axes, None if positive else SMALL)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _heat_maps(plt: Any, picture: Picture, found: Mapping[str, Findings]) -> Any:
    columns = min(len(found), MAX_PANELS)
    rows = -(-len(found) // columns)
    size = (3.2 * columns + 1, 3.2 * rows + 0.4)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    matrices = [[drawable(row) for row in findings.matrices[picture.of[0]]] for findings in found.values()]
    known = [value for matrix in matrices for row in matrix for value in row if not math.isnan(value)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    for axes in grid.flat[len(found) :]:
        axes.axis("off")
    for axes, label, matrix in zip(grid.flat, found, matrices, strict=False):
        image = axes.imshow(matrix, vmin=low, vmax=high, cmap="viridis", origin="lower")
        axes.set_title(drawn_label(label), fontsize=10)
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=grid, shrink=0.8)
    figure.suptitle(_heading(picture, size), fontsize=10)
    return figure


def _heading(picture: Picture, size: tuple[float, float]) -> str:
    return textwrap.fill(picture.title, int(PER_INCH * size[0]))
