"""Compare runs: a table of how they ended, and one picture of their curves.

python -m tools.compare RUN [RUN ...] [--output curves.png]
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curve = tuple[list[int], list[float]]
"""Optimizer steps, and the value at each."""

COLUMNS = ("train_loss", "val_loss", "val_bits_per_byte", "bigram_loss", "tokens", "tokens_per_second")


def read_curve(run: Path, tag: str) -> Curve:
    """One scalar of a run's TensorBoard log; empty where the run has not written it."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        return [], []
    scalars = events.Scalars(tag)
    return [scalar.step for scalar in scalars], [scalar.value for scalar in scalars]


def print_table(runs: list[Path]) -> None:
    """One row a run, from its summary.json; a run without one has not ended."""
    table = Table()
    for column in ("run", *COLUMNS):
        table.add_column(column.replace("_", " "))
    for run in runs:
        path = run / "summary.json"
        summary = json.loads(path.read_text()) if path.exists() else {}
        cells = (summary.get(column) for column in COLUMNS)
        table.add_row(str(run), *("-" if cell is None else f"{cell:,.4g}" for cell in cells))
    Console(width=None if Console().is_terminal else 160).print(table)


def draw(runs: list[Path], output: Path) -> None:
    """Training loss as a line, validation loss as dots, the bigram baseline dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for run in runs:
        (line,) = axes.plot(*read_curve(run, "train/loss"), linewidth=1, label=f"{run.parent.name}, training")
        axes.plot(*read_curve(run, "val/loss"), "o", color=line.get_color(), label=f"{run.parent.name}, validation")
    summary = runs[0] / "summary.json"
    bigram = json.loads(summary.read_text()).get("bigram_loss") if summary.exists() else None
    if bigram is not None:
        axes.axhline(bigram, color="gray", linestyle="--", label="bigram baseline")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.compare", description="Compare runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, such as runs/moe_spannorm/TIME")
    parser.add_argument("--output", type=Path, help="where to draw the curves (PNG); needs matplotlib")
    arguments = parser.parse_args()
    for run in arguments.runs:
        if not (run / "tensorboard").is_dir():
            print(f"Error: {run} is no run folder: it holds no tensorboard/", file=sys.stderr)
            raise SystemExit(2)
    print_table(arguments.runs)
    if arguments.output is not None:
        draw(arguments.runs, arguments.output)
        print(f"Curves: {arguments.output}")


if __name__ == "__main__":
    main()
