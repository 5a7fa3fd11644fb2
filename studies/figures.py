"""A study's records as pictures."""

import itertools
import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.atomic_write import write_whole
from core.printable import printable
from studies.grid import LEARNING_RATE, Point, Study
from studies.record import Record, loss_units
from studies.tables import Cell, Grids, tuned

Profile = tuple[list[float], list[float]]
"""Depth as a share of the blocks, and the value there."""
THEORY = "signal/block_{}/variance_theory"
DEPTH_PANELS = {
    "gradient of the parameters, over the last block's": "gradients/block_{}/all",
    "variance of the hidden state": "signal/block_{}/variance",
    "attention's variance over the stream's": "signal/block_{}/attn_ratio",
    "FFN's variance over the stream's": "signal/block_{}/ffn_ratio",
    "cosine similarity of two tokens": "representation/block_{}/token_cosine",
    "effective rank": "representation/block_{}/effective_rank",
    "cosine of a state before and after the block": "representation/block_{}/block_cosine",
}
LINEAR = ("token_cosine", "effective_rank", "block_cosine")
MAX_INCHES = 60.0
"""Of a picture's side: larger grids are drawn smaller, not larger pictures."""
DRAWN = 1e30
"""Values beyond it are left out of a picture: matplotlib's scales overflow."""
LABEL = 80
"""Characters of a label that are drawn."""


def pyplot() -> Any:
    """Return matplotlib's pyplot, which draws into files, and text as it stands: a dollar sign begins no formula."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["text.parse_math"] = False
    return plt


def plain_formatter() -> Any:
    """Return what writes numbers on a logarithmic axis as they are read; matplotlib's own writes formulas."""
    from matplotlib.ticker import LogFormatter

    class PlainFormatter(LogFormatter):  # type: ignore[misc, unused-ignore]
        """Leaves out those that a logarithmic axis has no room for."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    return PlainFormatter()


def log_scale(axes: Any, linear_below: float | None = None) -> None:
    """Give the values' axis a logarithmic scale, with numbers beside its small ticks where there is no other.

    Args:
        axes: what is drawn on.
        linear_below: magnitude below which the scale is linear, so that it has 0 and what is negative; None: nowhere.
    """
    axes.set_yscale("log") if linear_below is None else axes.set_yscale("symlog", linthresh=linear_below)
    axes.yaxis.set_major_formatter(plain_formatter())
    axes.yaxis.set_minor_formatter(plain_formatter())


def drawn_label(label: str) -> str:
    """Return a label as it is drawn; matplotlib would leave one out that begins with an underscore."""
    text = printable(label, LABEL)
    return f" {text}" if text.startswith("_") else text


def drawable(values: Sequence[float]) -> list[float]:
    """Return the values, those that no scale holds as NaN."""
    return [value if abs(value) < DRAWN else math.nan for value in values]


def _size(width: float, height: float) -> tuple[float, float]:
    return min(width, MAX_INCHES), min(height, MAX_INCHES)


def draw_map(study: Study, grid: Mapping[Point, Cell], output: Path) -> None:
    """Mean final validation loss, first axis down and the others across; cells with a failure are hatched."""
    plt = pyplot()
    rows = list(next(iter(study.axes.values())))
    columns = list(itertools.product(*list(study.axes.values())[1:]))
    figure, axes = plt.subplots(
        figsize=_size(
            2.0 + 0.08 * max(len(drawn_label(row)) for row in rows) + 1.15 * len(columns), 1.4 + 0.42 * len(rows)
        ),
        layout="constrained",
        squeeze=True,
    )
    values = [[grid[(row, *column)].mean for column in columns] for row in rows]
    shown = [[math.nan if value is None else value for value in row] for row in values]
    image = axes.imshow(shown, aspect="auto", cmap="viridis_r")
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        cell = grid[(row, *column)]
        if cell.failed:
            axes.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor="0.9", edgecolor="tab:red", hatch="//"))
            text = f"{len(cell.failed)} of {len(cell.records)}\nfailed"
        else:
            text = "-" if cell.mean is None else f"{cell.mean:.3f}"
        box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5}
        axes.text(j, i, text, ha="center", va="center", fontsize=8, bbox=box)
    _label_columns(axes, [drawn_label(" ".join(column)) for column in columns], 1.15)
    axes.set_yticks(range(len(rows)), [drawn_label(row) for row in rows])
    axes.set_xlabel(drawn_label(", ".join(list(study.axes)[1:])))
    figure.colorbar(image, label="final validation loss")
    _save(figure, output)


def _label_columns(axes: Any, labels: Sequence[str], inches: float) -> None:
    """Label the columns of a picture, each so many inches wide; aslant where the words would run into each other."""
    aslant = 0.085 * max(map(len, labels)) > inches
    axes.set_xticks(
        range(len(labels)),
        labels,
        rotation=30 if aslant else 0,
        ha="right" if aslant else "center",
        rotation_mode="anchor",
    )


def _is_a_number(label: str) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False


def draw_trend(study: Study, grid: Mapping[Point, Cell], output: Path) -> None:
    """Draw final validation loss over the second axis, by the points of the first; failures are crosses.

    Points are joined where the columns are numbers, and lie beside each other where they are words: between two of
    those there is nothing.
    """
    plt = pyplot()
    columns = list(itertools.product(*list(study.axes.values())[1:]))
    width = max(7.0, 1.0 + 0.8 * len(columns))
    figure, axes = plt.subplots(figsize=_size(width, 4.2), layout="constrained")
    joined = all(len(column) == 1 and _is_a_number(column[0]) for column in columns)
    rows = list(next(iter(study.axes.values())))
    apart = 0.0 if joined else 0.6 / len(rows)
    means = [cell.mean for cell in grid.values() if cell.mean is not None]
    top = max(means, default=1.0) + 0.1
    for i, row in enumerate(rows):
        cells, aside = [grid[(row, *column)] for column in columns], apart * (i - (len(rows) - 1) / 2)
        known = [(j, c.mean, c.deviation or 0.0) for j, c in enumerate(cells) if c.mean is not None]
        failed = [j for j, c in enumerate(cells) if c.failed]
        color = f"C{i}"
        if known:
            where, mean, spread = zip(*known, strict=True)
            style = "-" if joined else "none"
            places = [j + aside for j in where]
            axes.errorbar(places, mean, spread, color=color, marker="o", ls=style, capsize=3, label=drawn_label(row))
        shifted = [j + (aside or 0.06 * (i - len(study.axes) / 2)) for j in failed]
        if failed:
            axes.plot(shifted, [top] * len(failed), "x", color=color, label=None if known else drawn_label(row))
    _label_columns(axes, [drawn_label(" ".join(column)) for column in columns], (width - 1) / len(columns))
    axes.set(
        xlabel=drawn_label(", ".join(list(study.axes)[1:])), ylabel="final validation loss (crosses on top: failed)"
    )
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    _save(figure, output)


def draw_rates(study: Study, known: Grids, output: Path) -> None:
    """Draw final validation loss against the learning rate, the spikes below: a column for each point of the others.

    Bands span the seeds, a star marks each scheme's best rate, crosses on top the rates at which a run failed. Where
    other seeds judge the best rate, their mean is a diamond, with a bar over them.
    """
    at = list(study.axes).index(LEARNING_RATE)
    first = 0 if at else 1
    rows = list(list(study.axes.values())[first]) if len(study.axes) > 1 else [""]
    others = [list(labels) for i, labels in enumerate(study.axes.values()) if i not in (at, first)]
    panels = list(itertools.product(*others))
    grid, judged = known.selection, known.judged if known.judged is not known.selection else {}
    best = tuned(study, grid)
    means = [cell.mean for cell in grid.values() if cell.mean is not None]
    top = max(means, default=1.0) + 0.1
    rates = list(study.axes[LEARNING_RATE])
    with_spikes = any(record.spikes is not None for cell in grid.values() for record in cell.records)
    figure, columns = _rate_axes(len(panels), with_spikes)
    for panel, (axes, lower) in zip(panels, columns, strict=True):
        for i, row in enumerate(rows):
            point = [row, *panel] if len(study.axes) > 1 else [*panel]
            cells = [grid[(*point[:at], rate, *point[at:])] for rate in rates]
            _draw_losses(axes, cells, drawn_label(row), i, top)
            chosen = best.get(tuple(point))
            if chosen is not None:
                axes.plot(rates.index(chosen[at]), grid[chosen].mean, "*", color=f"C{i}", markersize=14)
                _draw_judged(axes, rates.index(chosen[at]) + 0.1 + 0.04 * i, judged.get(chosen), f"C{i}")
            if lower is not None:
                _draw_spikes(lower, cells, f"C{i}")
        for each in (axes, lower) if lower is not None else (axes,):
            each.set_xticks(range(len(rates)), [drawn_label(rate) for rate in rates])
            each.grid(alpha=0.3)
        axes.set(title=drawn_label(" ".join(panel)))
        (axes if lower is None else lower).set_xlabel("learning rate")
    axes, lower = columns[0]
    axes.set_ylabel("final validation loss (crosses on top: failed)")
    if lower is not None:
        lower.set_ylabel("spikes in\n10,000 steps")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    _save(figure, output)


def _rate_axes(panels: int, with_spikes: bool) -> tuple[Any, list[tuple[Any, Any]]]:
    """Return a figure, and for each panel its axes and those for the spikes below it, or None."""
    across = min(3, panels)
    down = -(-panels // across)
    figure, grid = pyplot().subplots(
        down * (1 + with_spikes),
        across,
        figsize=_size(2 + 4.5 * across, (5.2 if with_spikes else 4) * down),
        sharey="row",
        squeeze=False,
        layout="constrained",
        height_ratios=([3, 1] if with_spikes else [1]) * down,
    )
    uppers, lowers = grid[:: 1 + with_spikes].flat, grid[1::2].flat if with_spikes else itertools.repeat(None)
    columns = list(zip(uppers, lowers, strict=False))
    for unused in (axes for column in columns[panels:] for axes in column if axes is not None):
        unused.axis("off")
    return figure, columns[:panels]


def _draw_losses(axes: Any, cells: Sequence[Cell], label: str, number: int, top: float) -> None:
    """Draw a scheme's mean at each rate, a band over the seeds, and crosses on top where a run failed."""
    known, color = [(j, c) for j, c in enumerate(cells) if c.mean is not None], f"C{number}"
    if known:
        where = [j for j, _ in known]
        axes.plot(where, [c.mean for _, c in known], color=color, marker="o", label=label)
        low, high = zip(*((min(c.values.values()), max(c.values.values())) for _, c in known), strict=True)
        axes.fill_between(where, low, high, color=color, alpha=0.2)
    failed = [j + 0.05 * number for j, c in enumerate(cells) if c.failed]
    axes.plot(failed, [top] * len(failed), "x", color=color, label=None if known else label)


def _draw_spikes(axes: Any, cells: Sequence[Cell], color: str) -> None:
    spikes = [[record.spikes for record in cell.records if record.spikes is not None] for cell in cells]
    counted = [(j, statistics.fmean(found)) for j, found in enumerate(spikes) if found]
    axes.plot([j for j, _ in counted], [mean for _, mean in counted], color=color, marker=".")


def _draw_judged(axes: Any, where: float, cell: Cell | None, color: str) -> None:
    """Draw the mean of the seeds that judge a rate, and a bar from the lowest to the highest of them."""
    if cell is None or cell.mean is None:
        return
    losses = cell.values.values()
    reach = [[cell.mean - min(losses)], [max(losses) - cell.mean]]
    axes.errorbar(where, cell.mean, reach, color=color, marker="D", markersize=5, capsize=3)


def draw_curves(study: Study, grid: Mapping[Point, Cell], output: Path) -> None:
    """Draw the training loss of every run, a panel for each point of the first axis."""
    plt = pyplot()
    rows = list(next(iter(study.axes.values())))
    columns = list(itertools.product(*list(study.axes.values())[1:]))
    across = 2 if len(rows) == 4 else min(3, len(rows))
    down = -(-len(rows) // across)
    figure, panels = plt.subplots(
        down,
        across,
        figsize=_size(4 * across, 2.8 * down),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for row, axes in zip(rows, panels.flat, strict=False):
        for j, column in enumerate(columns):
            for k, record in enumerate(grid[(row, *column)].records):
                label = drawn_label(" ".join(column)) if k == 0 else None
                axes.plot(record.train_loss[0], drawable(record.train_loss[1]), color=f"C{j}", linewidth=1, label=label)
        axes.set_title(drawn_label(row))
        axes.grid(alpha=0.3)
    for place in range(len(rows), across * down):
        panels.flat[place].axis("off")
        panels.flat[place - across].tick_params(labelbottom=True)
    finite = [x for cell in grid.values() for r in cell.records for x in r.train_loss[1] if abs(x) < DRAWN]
    panels[0, 0].set_ylim(min(finite, default=0) - 0.1, min(max(finite, default=1), 6.0))
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2 * across)
    figure.supxlabel("optimizer step")
    units = loss_units(record for cell in grid.values() for record in cell.records)
    figure.supylabel(f"training loss ({drawn_label(units)})")
    _save(figure, output)


def profile(record: Record, tag: str, last: bool) -> Profile:
    """Return a figure over the blocks, at the first or the last of its steps."""
    steps = record.by_block.get(tag, {})
    if not steps:
        return [], []
    by_block = steps[(max if last else min)(steps, key=int)]
    blocks = sorted(by_block, key=int)
    return [int(block) / int(blocks[-1]) for block in blocks], drawable([by_block[block] for block in blocks])


def draw_depth(study: Study, grid: Mapping[Point, Cell], column: Point, output: Path) -> None:
    """Draw what the monitors saw over depth, at the first step (dotted) and at the end (solid), of one seed."""
    plt = pyplot()
    figure, panels = plt.subplots(2, 4, figsize=(16, 6.5), sharex=True, layout="constrained")
    for axes, (title, tag) in zip(panels.flat, DEPTH_PANELS.items(), strict=False):
        for i, row in enumerate(next(iter(study.axes.values()))):
            for record in grid[(row, *column)].records[:1]:
                for last, style in ((False, ":"), (True, "-")):
                    depth, values = profile(record, tag, last)
                    if tag == DEPTH_PANELS["gradient of the parameters, over the last block's"] and values:
                        values = [value / values[-1] if values[-1] else math.nan for value in values]
                    axes.plot(depth, values, style, color=f"C{i}", label=drawn_label(row) if last else None)
        axes.set_title(title, fontsize=10)
        if tag.split("/")[-1] not in LINEAR:
            log_scale(axes)
        axes.grid(alpha=0.3)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    panels[-1, -1].axis("off")
    panels[-1, -1].legend(handles, labels, loc="center", title="dotted: first step\nsolid: end")
    title = ", ".join(f"{axis} {label}" for axis, label in zip(list(study.axes)[1:], column, strict=True))
    figure.suptitle(drawn_label(title))
    figure.supxlabel("depth (share of the blocks)")
    _save(figure, output)


def draw_decay(decays: Mapping[str, tuple[Sequence[float], Sequence[float] | None]], output: Path) -> None:
    """Draw the hidden state's gradient norm at initialization, over that after the last block; predicted dashed.

    Args:
        decays: {label: (measured, predicted or None)}, by block.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=_size(9, max(4.2, 0.2 * len(decays))), layout="constrained")
    for i, (label, (measured, predicted)) in enumerate(decays.items()):
        depth = [(block + 1) / len(measured) for block in range(len(measured))]
        axes.plot(depth, drawable(measured), color=f"C{i}", label=drawn_label(label))
        if predicted is not None:
            axes.plot(
                [(block + 1) / len(predicted) for block in range(len(predicted))],
                drawable(predicted),
                "--",
                color=f"C{i}",
                alpha=0.6,
            )
    axes.set(xlabel="depth (share of the blocks)", ylabel="hidden gradient over the last block's")
    log_scale(axes)
    axes.set_title("measured at initialization (solid) and predicted (dashed)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    _save(figure, output)


def draw_cost(seconds: Mapping[str, float], output: Path) -> None:
    """Time of a run, a bar each."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=_size(7, 0.8 + 0.32 * len(seconds)), layout="constrained")
    axes.barh([drawn_label(label) for label in seconds], list(seconds.values()))
    axes.invert_yaxis()
    axes.set_xlabel("seconds of training a run, median; runs shared their machine")
    _save(figure, output)


Draw = Callable[..., None]


def _save(figure: Any, output: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        write_whole(output, lambda unfinished: figure.savefig(unfinished, dpi=80, format="png"))
    pyplot().close(figure)
