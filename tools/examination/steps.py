"""Reads and draws what callbacks.monitors.anatomy has kept of a run: how depth comes into use over its steps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from core.untrusted import MIB, Untrusted, beyond, bound, parse_json, read_bytes
from studies.figures import drawable, drawn_label, plain_formatter, pyplot
from tools.examination.pictures import MAX_PANELS
from tools.picture import save_picture

FOLDER = "anatomy/steps"
"""Below the run's: callbacks.monitors.anatomy.FOLDER."""
MAX_STEPS = 10_000
MAX_BYTES = 64 * MIB
"""Of all the files of a run."""
MAX_SCALARS = 64
"""Of a run; each has a panel of its own, and all measures together have about forty."""
Number = Annotated[float, Field(allow_inf_nan=False)] | None
Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+$", max_length=100)]
MAX_TICKS = 7
LEAST = 1e-4
"""Nats below which a block's share of the loss is drawn as this little."""


@dataclass(frozen=True)
class KeptCurve:
    """A curve of a step."""

    values: Annotated[list[Number], Field(max_length=4096)]


@dataclass(frozen=True)
class KeptFindings:
    """Holds what one measure has found at a step; only what is drawn is read."""

    scalars: Annotated[dict[Name, Number], Field(max_length=MAX_SCALARS)] = field(default_factory=dict)
    curves: Annotated[dict[Name, KeptCurve], Field(max_length=64)] = field(default_factory=dict)


@dataclass(frozen=True)
class Kept:
    """Holds what was found after so many steps."""

    step: Annotated[int, Field(ge=0, le=10**15)]
    findings: Annotated[dict[Name, KeptFindings], Field(max_length=64)]

    def scalars(self) -> dict[str, float]:
        """Return the scalars of all measures."""
        parts = (part.scalars for part in self.findings.values())
        return {name: math.nan if value is None else value for part in parts for name, value in part.items()}


def kept_of(folder: Path) -> list[Kept]:
    """Return what was kept of a run, in the order of its steps; nothing, where nothing was.

    Raises:
        Untrusted: a file is not what the callback writes, or all together are more than is read.
    """
    kept: list[Kept] = []
    left, names, blocks = bound(MAX_BYTES), set[str](), set[int]()
    for path in sorted((folder / FOLDER).glob("*.json"))[:MAX_STEPS]:
        content = read_bytes(path)
        left -= len(content)
        if left < 0:
            raise Untrusted(beyond(f"{path.parent} has more than {bound(MAX_BYTES):,} bytes", MAX_BYTES))
        part: Kept = parse_json(content, path, Kept)
        names |= part.scalars().keys()
        blocks |= {len(curve.values) for curve in [_drop_curve(part)] if curve is not None}
        if len(names) > bound(MAX_SCALARS):
            raise Untrusted(beyond(f"{path.parent} has {len(names)} scalars", MAX_SCALARS))
        if len(blocks) > 1 or 0 in blocks:
            counts = " and ".join(map(str, sorted(blocks)))
            raise Untrusted(f"{path} cannot be read: drop_by_block has values of {counts} blocks")
        kept.append(part)
    return sorted(kept, key=lambda part: part.step)


def draw_scalars(kept: Mapping[str, Sequence[Kept]], output: Path) -> None:
    """Draw each scalar over the steps, a panel each, a line for each run."""
    plt = pyplot()
    names = list(dict.fromkeys(name for steps in kept.values() for part in steps for name in part.scalars()))
    columns = min(MAX_PANELS, len(names))
    rows = -(-len(names) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.5 * rows), squeeze=False, layout="constrained")
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    for axes, name in zip(grid.flat, names, strict=False):
        for label, steps in kept.items():
            values = drawable([part.scalars().get(name, math.nan) for part in steps])
            axes.plot([part.step for part in steps], values, marker=".", label=drawn_label(label))
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.grid(alpha=0.3)
    grid[0, 0].legend(fontsize=8)
    figure.supxlabel("optimizer step", fontsize=9)
    save_picture(figure, output, dpi=110)
    plt.close(figure)


def draw_drops(kept: Mapping[str, Sequence[Kept]], output: Path) -> None:
    """Draw what the loss is more without each block, over blocks and steps: a panel for each run."""
    from matplotlib.colors import LogNorm

    plt = pyplot()
    columns = min(MAX_PANELS, len(kept))
    rows = -(-len(kept) // columns)
    size = (3.2 * columns + 1, 2.6 * rows + 0.4)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat[len(kept) :]:
        axes.axis("off")
    drops = {label: [_drops(part) for part in steps] for label, steps in kept.items()}
    known = (value for steps in drops.values() for values in steps for value in values if not math.isnan(value))
    most = max(known, default=1.0)
    scale = LogNorm(LEAST, max(most, 10 * LEAST))
    for axes, (label, steps) in zip(grid.flat, kept.items(), strict=False):
        image: Any = axes.imshow(list(zip(*drops[label], strict=True)), aspect="auto", origin="lower", norm=scale)
        ticks = range(0, len(steps), -(-len(steps) // MAX_TICKS))
        axes.set_xticks(ticks, [f"{steps[tick].step}" for tick in ticks])
        axes.set_yticks(range(len(drops[label][0])), [str(n + 1) for n in range(len(drops[label][0]))], fontsize=7)
        axes.set_title(drawn_label(label), fontsize=10)
        axes.set_xlabel("optimizer step")
    grid[0, 0].set_ylabel("block")
    bar = figure.colorbar(image, ax=grid, shrink=0.8, format=plain_formatter())
    bar.minorformatter = plain_formatter()
    figure.suptitle("loss without the block, less the loss (nats)", fontsize=10)
    save_picture(figure, output, dpi=110)
    plt.close(figure)


def _drop_curve(part: Kept) -> KeptCurve | None:
    return part.findings.get("layer_drop", KeptFindings()).curves.get("drop_by_block")


def _drops(part: Kept) -> list[float]:
    curve = _drop_curve(part)
    assert curve is not None, "what `has_drops` says"
    values = drawable([math.nan if value is None else value for value in curve.values])
    return [value if math.isnan(value) else max(LEAST, value) for value in values]


def has_scalars(steps: Sequence[Kept]) -> bool:
    """Return whether some step has a scalar."""
    return any(part.scalars() for part in steps)


def has_drops(steps: Sequence[Kept]) -> bool:
    """Return whether every step has the loss without each block, of as many blocks."""
    curves = [_drop_curve(part) for part in steps]
    numbers = {0 if curve is None else len(curve.values) for curve in curves}
    return len(numbers) == 1 and 0 not in numbers
