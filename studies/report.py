"""Report on a study: report.md, its pictures, and all of it in one report.html.

    python -m studies.report docs/results/studies/placement_by_init/laptop
    python -m studies.report runs/studies/learning_rate/laptop

Takes the folder of a study's records, or that of its runs; what is missing, unfinished or failed is shown as such. The
report is written beside the records.
"""

import argparse
import base64
import itertools
import os
import re
import statistics
import sys
from functools import partial
from pathlib import Path

from core import cli
from core.errors import ConfigError, UserError
from studies import figures
from studies.grid import Study
from studies.record import FAILURES, Record, collect
from studies.tables import LEARNING_RATE, Cell, Point, cells, compare, markdown, tuned

LARGEST_BUILT = 50_000_000
"""Parameters of a model that the report builds anew, to measure its gradient at initialization."""
SURE = 0.05


def load(folder: Path) -> tuple[Study, list[Record], list[str]]:
    """The study of a folder, the records of its runs, and the names of those that are half written.

    Raises:
        ConfigError: no study is there.
    """
    path = folder / "study.yaml"
    if not path.exists():
        valid = "the folder of a study's records or runs, as docs/results/studies/STUDY/SCALE: it holds a study.yaml"
        raise ConfigError("RUNS", str(folder), valid)
    study, records, unfinished = Study.load(path), [], []
    for run in study.runs():
        path = folder / f"{run.name}.json"
        try:
            if path.exists():
                records.append(Record.load(path))
            elif (folder / run.name / "summary.json").exists():
                records.append(collect(run, folder / run.name))
            elif (folder / run.name).exists():
                unfinished.append(run.name)
        except (ValueError, TypeError):  # cut off, or of another make
            unfinished.append(run.name)
    return study, records, unfinished


def write(folder: Path) -> Path:
    """Make the report, and return its path."""
    study, records, unfinished = load(folder)
    grid = cells(study, records)
    linked = {point: _linked(cell, folder) for point, cell in grid.items()}
    parts = [
        f"# {study.name}, {study.scale} scale",
        study.question,
        _extent(study, grid, unfinished),
        "## Final validation loss\n\nNats per token: mean ± standard deviation over seeds (how many).",
        _loss_table(study, linked),
        _figure(folder, "map", "What each point came to", partial(figures.draw_map, study, grid)),
    ]
    if len(study.axes) > 1:
        parts.append(_figure(folder, "trend", "Across the second axis", partial(figures.draw_trend, study, grid)))
    if LEARNING_RATE in study.axes:
        parts.append("## Each at its own best learning rate\n\n" + _tuned_table(study, grid))
    if study.baseline is not None:
        parts.append(f"## Against {study.baseline}\n\n" + _comparisons(study, grid))
    parts += ["## Training failure\n\n" + _failures(grid)]
    parts += ["## Curves", _figure(folder, "curves", "Training loss", partial(figures.draw_curves, study, grid))]
    parts.append("## Over depth")
    for column in itertools.product(*list(study.axes.values())[1:]):
        name = "_".join(["depth", *column])
        parts.append(
            _figure(folder, name, f"Over depth: {' '.join(column)}", partial(figures.draw_depth, study, grid, column))
        )
    decays = _decays(study, grid)
    if decays:
        parts.append("## Gradient decay, measured and predicted\n\n" + _decay_table(decays))
        parts.append(_figure(folder, "decay", "Gradient decay", partial(figures.draw_decay, decays)))
    seconds = _seconds(grid)
    if seconds:
        parts += ["## Cost", _figure(folder, "cost", "Time of a run", partial(figures.draw_cost, seconds))]
    parts.append("## Runs\n\n" + _runs_table(grid, folder))
    report = folder / "report.md"
    report.write_text("\n\n".join(parts) + "\n")
    (folder / "report.html").write_text(html(report.read_text(), folder))
    return report


def html(text: str, folder: Path) -> str:
    """The report as one file: Markdown rendered, pictures inside."""
    from markdown import markdown as render

    def inline(match: re.Match[str]) -> str:
        content = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{content}"'

    body = re.sub(r'src="([^":]+\.png)"', inline, render(text, extensions=["tables", "toc"]))
    title = text.partition("\n")[0].removeprefix("# ")
    style = "body{font-family:sans-serif;max-width:72em;margin:2em auto}img{max-width:100%}td,th{padding:.2em .8em}"
    return f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{style}</style>{body}\n"


def _extent(study: Study, grid: dict[Point, Cell], unfinished: list[str]) -> str:
    found = sum(len(cell.records) for cell in grid.values())
    planned = sum(cell.planned for cell in grid.values())
    failed = sum(len(cell.failed) for cell in grid.values())
    missing = f" **{planned - found} are missing.**" if found < planned else ""
    missing += f" Half written, and left out: {', '.join(unfinished)}." if unfinished else ""
    return (
        f"{planned} runs are planned ({' x '.join(study.axes)} x {len(study.seeds)} seeds); {found} have ended, of "
        f"which training failed in {failed}.{missing} Every run: `{' '.join(study.overrides)}`. Needs: {study.needs}."
    )


def _linked(cell: Cell, folder: Path) -> str:
    return f"[{cell}](#runs)" if cell.records else str(cell)


def _loss_table(study: Study, linked: dict[Point, str]) -> str:
    axes = list(study.axes.values())
    columns = list(itertools.product(*axes[1:]))
    rows = [[row, *(linked[(row, *column)] for column in columns)] for row in axes[0]]
    return markdown([" / ".join(study.axes), *(" ".join(column) for column in columns)], rows)


def _tuned_table(study: Study, grid: dict[Point, Cell]) -> str:
    best = tuned(study, grid)
    at = list(study.axes).index(LEARNING_RATE)
    others = [axis for axis in study.axes if axis != LEARNING_RATE]
    rates = list(study.axes[LEARNING_RATE])
    rows = []
    for point in itertools.product(*(study.axes[axis] for axis in others)):
        every = [grid[(*point[:at], rate, *point[at:])] for rate in rates]
        lasting = [rate for rate, cell in zip(rates, every, strict=True) if cell.mean is not None]
        if point not in best:
            words = "none without a failure" if any(cell.records for cell in every) else "no run yet"
            rows.append([" ".join(point), "-", words, "-"])
            continue
        rate = best[point][at]
        edge = " (at the edge of the grid)" if rate in (rates[0], rates[-1]) else ""
        rows.append([" ".join(point), f"{rate}{edge}", str(grid[best[point]]), ", ".join(lasting)])
    return markdown([" / ".join(others), "best learning rate", "loss there", "rates without a failure"], rows)


def _comparisons(study: Study, grid: dict[Point, Cell]) -> str:
    """Point by point, or, where learning rates are tuned, best against best."""
    assert study.baseline is not None
    tuning = LEARNING_RATE in study.axes
    best = tuned(study, grid) if tuning else {}
    chosen = {rest: best.get(rest) for rest in best} if tuning else {point: point for point in grid}
    rows = []
    for point, ours in chosen.items():
        theirs = chosen.get((study.baseline, *point[1:]))
        if point[0] == study.baseline or ours is None:
            continue
        found = compare(grid[ours], grid[theirs]) if theirs is not None else None
        if found is None:
            rows.append([*point, "-", "-", "failed in one of the two, or no seed in common"])
            continue
        p = "-" if found.p is None else f"{found.p:.3f}"
        sure = found.p is not None and found.p < SURE
        verdict = ("better" if found.difference < 0 else "worse") if sure else "not told apart"
        rows.append([*point, f"{found.difference:+.3f} ({found.seeds})", p, verdict])
    axes = [axis for axis in study.axes if not (tuning and axis == LEARNING_RATE)]
    words = (
        "Difference of the final validation loss, paired by seed (how many), and the two-sided p of the paired t-test; "
        f"below {SURE} it counts, without a correction for the number of rows. With two or three seeds only large, "
        "even differences can be told apart."
    )
    words += " Each at its own best learning rate." if tuning else ""
    return f"{words}\n\n{markdown([*axes, 'difference', 'p', 'verdict'], rows)}"


def _failures(grid: dict[Point, Cell]) -> str:
    definition = "\n".join(f"- **{name}**: {words}." for name, words in FAILURES.items())
    failed = [record for cell in grid.values() for record in cell.failed]
    rows = [[record.name, record.status, record.reason.replace("|", "/")] for record in failed]
    table = markdown(["run", "failure", "what it said"], rows) if rows else "None of these runs failed."
    return f"Training has failed (`studies/record.py`) where\n\n{definition}\n\n{table}"


def _decays(study: Study, grid: dict[Point, Cell]) -> dict[str, tuple[list[float], list[float] | None]]:
    """Of every point whose model is small enough, by a forward and backward pass of random tokens; see tools.signal."""
    from tools.signal import report

    decays: dict[str, tuple[list[float], list[float] | None]] = {}
    for point, cell in grid.items():
        if not cell.records or not 0 < (cell.records[0].parameters or 0) <= LARGEST_BUILT:
            continue
        result = report([*cell.records[0].overrides, f"seed={cell.records[0].seed}"])
        unit = result.signals[-1].hidden_gradient or float("nan")
        predicted = result.predicted("hidden_gradient")
        measured = [signal.hidden_gradient / unit for signal in result.signals]
        decays[" ".join(point)] = measured, None if predicted is None else [value / unit for value in predicted]
    return decays


def _decay_table(decays: dict[str, tuple[list[float], list[float] | None]]) -> str:
    words = "Gradient norm of the hidden state after the first block over that after the last, at initialization."
    rows = [
        [label, f"{measured[0]:.3g}", "no theory" if predicted is None else f"{predicted[0]:.3g}"]
        for label, (measured, predicted) in decays.items()
    ]
    return f"{words}\n\n{markdown(['', 'measured', 'predicted'], rows)}"


def _seconds(grid: dict[Point, Cell]) -> dict[str, float]:
    found = {
        " ".join(point): [r.seconds for r in cell.records if r.seconds is not None] for point, cell in grid.items()
    }
    return {label: statistics.median(seconds) for label, seconds in found.items() if seconds}


def _runs_table(grid: dict[Point, Cell], folder: Path) -> str:
    rows = []
    for cell in grid.values():
        for record in cell.records:
            run = Path(record.folder)
            target = Path(os.path.relpath(run, folder)) if run.exists() else Path(f"{record.name}.json")
            loss = "-" if record.val_loss is None else f"{record.val_loss:.4f}"
            seconds = "-" if record.seconds is None else f"{record.seconds:.0f}"
            rows.append([f"[{record.name}]({target})", record.status, loss, seconds])
    return "Links lead to a run's folder where it is on this machine, and else to its record.\n\n" + markdown(
        ["run", "status", "validation loss", "seconds"], rows
    )


def _figure(folder: Path, name: str, title: str, draw: figures.Draw) -> str:
    file = re.sub(r"[^\w.-]+", "-", name) + ".png"
    draw(folder / file)
    return f"![{title}]({file})"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="folders of records")
    arguments = parser.parse_args()
    for folder in arguments.runs:
        try:
            print(f"Report: {write(folder)}")
        except UserError as error:
            print(f"Error: {error}", file=sys.stderr)
            raise SystemExit(cli.USER_ERROR) from None


if __name__ == "__main__":
    cli.run(main)
