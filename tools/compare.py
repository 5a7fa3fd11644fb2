"""Compare runs: in which settings they differ, how they ended, how stably they trained, and a picture of their curves.

    python -m tools.compare RUN1 RUN2                                            # draws runs/compare.png
    python -m tools.compare RUN1 RUN2 tags=moe/max_load,moe/dead_experts output=experts.png
    python -m tools.compare RUN1 RUN2 outcomes=layer_drop,late_drop        # of the models: docs/anatomy.md

Reads summaries, TensorBoard's event files and CSV tables; writes the picture and nothing else.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from core import cli
from core.dataclass_cli import FIRST
from core.errors import require
from core.event_files import has_curves
from core.printable import cell, printable
from core.status import MEASURED, read_summary
from core.task import NATS_PER_TOKEN
from tools.curves import Curve, from_one, read_curves
from tools.picture import check_picture, save_picture
from tools.run_facts import as_text, differences, facts
from tools.run_labels import labels
from tools.stability import COLUMN_NAMES, Stability, stability

COLUMNS = (
    "train_loss",
    "val_loss",
    "val_bits_per_byte",
    "bigram_loss",
    "tokens",
    "tokens_per_second",
    "images",
    "images_per_second",
)
ALWAYS = ("train_loss", "val_loss")
"""Others are shown where a run has them."""
PICTURE = Path("runs/compare.png")
MAX_DIFFERENCES = 40
"""Settings that are shown as different."""
LATE = 0.1
"""The last part of a run, over which a tag's mean is shown: one logged step alone is noise."""


@dataclass(frozen=True)
class CompareConfig:
    """Holds the fields that `python -m tools.compare` takes.

    Attributes:
        runs: run folders, such as runs/moe_spannorm/TIME.
        tags: scalars to compare instead of the losses.
        outcomes: measure these of each run's last weights, on the same text, and show them in a table of their own.
        output: the picture that is drawn.
        allow: what the runs' configurations name, and you vouch for, where outcomes are measured: classes of yours, and
            addresses.
    """

    runs: tuple[Path, ...] = field(metadata=FIRST)
    tags: tuple[str, ...] = ()
    outcomes: tuple[str, ...] = ()
    output: Path = PICTURE
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        labels(self.runs)  # which refuses a run that is given twice


class Run:
    """Holds what a run folder says.

    Attributes:
        folder: the run's.
        summary: the numbers of summary.json; empty where the run has not ended.

    Raises:
        Untrusted: a file of the run cannot be read as what it is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.summary: dict[str, Any] = read_summary(folder)
        self._curves = read_curves(folder)

    def curve(self, tag: str) -> Curve:
        """Return one scalar's curve; empty where the run has not written it."""
        return self._curves.get(tag, ([], []))

    @cached_property
    def stability(self) -> Stability:
        """The run's spikes, extreme gradients and activations."""
        return stability(self.folder, self._curves)

    @property
    def figures(self) -> dict[str, float]:
        """Return what the task measures of held-out data beside the loss, as far as it is known."""
        found: dict[str, float] = self.summary.get(MEASURED, {})
        return found

    @property
    def loss_unit(self) -> str:
        """Return that of the losses; older runs, which do not say it, are of tokens."""
        return str(self.summary.get("loss_unit", NATS_PER_TOKEN))

    def late(self, tag: str) -> list[float]:
        """Return the scalar's values in the last part of the run."""
        _, values = self.curve(tag)
        return values[-max(1, round(LATE * len(values))) :] if values else []


def make_table(runs: Sequence[Run], tags: Sequence[str]) -> Table:
    """Make one row a run: its summary, or the asked scalars' mean over the last part and their largest value there."""
    table = Table()
    table.add_column("run", overflow="fold")
    if not tags:
        figures = dict.fromkeys(name for run in runs for name in run.figures)
        known = [name for name in COLUMNS if name in ALWAYS or any(run.summary.get(name) is not None for run in runs)]
        for column in (*known, *figures):
            table.add_column(cell(column.replace("_", " ")))
        for run in runs:
            values = (*(run.summary.get(column) for column in known), *(run.figures.get(name) for name in figures))
            table.add_row(cell(run.folder), *("-" if value is None else f"{value:,.4g}" for value in values))
        return table
    table.title = f"mean (largest) over the last {LATE:.0%} of the run"
    for tag in tags:
        table.add_column(cell(tag))
    for run in runs:
        late = [run.late(tag) for tag in tags]
        cells = (f"{sum(v) / len(v):,.4g} ({max(v):,.4g})" if v else "-" for v in late)
        table.add_row(cell(run.folder), *cells)
    return table


def make_difference_table(runs: Sequence[Run]) -> Table | None:
    """Make one row for each setting and origin that is not the same in all runs; None: there is none."""
    found = differences([facts(run.folder) for run in runs])
    if len(runs) < 2 or not found:
        return None
    names = labels([run.folder for run in runs])
    table = Table("differs in")
    for name in names:
        table.add_column(cell(name, 80))
    for name, values in list(found.items())[:MAX_DIFFERENCES]:
        table.add_row(cell(name), *(cell(as_text(value), 80) for value in values))
    if len(found) > MAX_DIFFERENCES:
        table.add_row(f"and {len(found) - MAX_DIFFERENCES} more")
    return table


def make_stability_table(runs: Sequence[Run]) -> Table:
    """Make one row a run: how stably it has trained, as far as it has logged what that takes."""
    table = Table("run", *COLUMN_NAMES.values())
    for run in runs:
        values = (getattr(run.stability, name) for name in COLUMN_NAMES)
        table.add_row(cell(run.folder), *("-" if value is None else f"{value:,.4g}" for value in values))
    return table


def measure(config: CompareConfig) -> Table:
    """Measure the outcomes, and make one row a run.

    Raises:
        ConfigError: no such outcome, a run that cannot be opened, or runs of different tokens.
    """
    from tools.examination.examine import Chosen, examine, known_outcomes

    measures = dict.fromkeys(known_outcomes(config.outcomes).values())
    _, examined = examine(Chosen(config.runs, tuple(measures), allow=config.allow))
    table = Table("run", *config.outcomes, title="outcomes, measured on the same text")
    for found in examined:
        scalars = {name: value for part in found.findings.values() for name, value in part.scalars.items()}
        values = (scalars.get(name) for name in config.outcomes)
        table.add_row(cell(found.folder), *("-" if value is None else f"{value:,.4g}" for value in values))
    return table


def draw(runs: Sequence[Run], tags: Sequence[str], output: Path) -> None:
    """Draw one panel a tag; without tags, training loss as a line, validation loss as dots, bigram baseline dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    warnings.filterwarnings("ignore", "Glyph .* missing from font")
    plt.rcParams["text.parse_math"] = False  # a dollar sign in a name begins no formula
    height = 4.5 if not tags else min(3 * len(tags), 100)
    figure, grid = plt.subplots(max(1, len(tags)), squeeze=False, figsize=(8, height), layout="constrained")
    units = ", ".join(dict.fromkeys(run.loss_unit for run in runs))
    for tag, axes in zip(tags or [f"loss ({units})"], grid.flat, strict=True):
        for run, name in zip(runs, labels([run.folder for run in runs]), strict=True):
            label = f" {printable(name, 80)}" if name.startswith("_") else printable(name, 80)  # "_x" is not shown
            if tags:
                axes.plot(*from_one(run.curve(tag)), linewidth=1, label=label)
                continue
            (line,) = axes.plot(*from_one(run.curve("train/loss")), linewidth=1, label=f"{label}, training")
            axes.plot(*from_one(run.curve("val/loss")), "o", color=line.get_color(), label=f"{label}, validation")
        if not tags and runs[0].summary.get("bigram_loss") is not None:
            axes.axhline(runs[0].summary["bigram_loss"], color="gray", linestyle="--", label="bigram baseline")
        axes.set(ylabel=printable(tag, 80))
        axes.grid(alpha=0.3)
        axes.legend()
    grid[-1, 0].set_xlabel("optimizer step")
    save_picture(figure, output, dpi=120)
    plt.close(figure)


@cli.tool
def main(config: CompareConfig) -> None:
    for folder in config.runs:
        require(has_curves(folder), "RUN", str(folder), "the folder of a run, with event files or csv/ in it")
    check_picture(config.output)
    runs = [Run(folder) for folder in config.runs]
    for tag in config.tags:
        require(any(run.curve(tag)[0] for run in runs), "tags", tag, "a scalar that one of the runs has written")
    measured = measure(config) if config.outcomes else None
    console = Console(width=None if Console().is_terminal else 160)
    difference = make_difference_table(runs)
    if difference is not None:
        console.print(difference)
    console.print(make_table(runs, config.tags))
    if not config.tags:
        console.print(make_stability_table(runs))
    if measured is not None:
        console.print(measured)
    draw(runs, config.tags, config.output)
    print(f"Curves: {printable(config.output, limit=None)}")


if __name__ == "__main__":
    cli.run(main)
