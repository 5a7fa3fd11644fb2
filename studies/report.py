"""Report on a study: report.md, its pictures, and all of it in one report.html.

    python -m studies.report results/studies/placement_by_init/laptop
    python -m studies.report runs/studies/learning_rate/laptop

Takes the folder of a study's records, or that of its runs; what is missing, unfinished or failed is shown as such. The
report is written beside the records, or into output=FOLDER.
"""

import itertools
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from analysis.stability import learning_rate_sensitivity
from core import cli
from core.atomic_write import write_whole
from core.dataclass_cli import FIRST
from core.errors import ConfigError, UserError
from core.printable import printable
from core.provenance import FIELDS
from core.status import SUMMARY
from core.task import LOSS
from core.untrusted import is_within
from studies import figures
from studies.decay import Decay
from studies.document import (
    Block,
    Bullets,
    Code,
    Heading,
    Inline,
    Link,
    Paragraph,
    Picture,
    Strong,
    Table,
    Words,
    html,
    markdown,
)
from studies.grid import LEARNING_RATE, Planned, Point, Study
from studies.plan import was_begun_as
from studies.record import BLEMISHES, FAILURES, Record, collect, loss_units
from studies.tables import Cell, Comparison, Grids, compare, corrected, grids, judging_runs, of_outcome, tuned
from tools.stability import COLUMN_NAMES

SURE = 0.05
MAX_DEPTH_PICTURES = 12
"""Pictures over depth, one for each point of the other axes; further ones are left out, which the report says."""
MAX_DRAWN = 1000
"""Points of a grid that is drawn; the tables have all of a larger one."""
NAMED = 20
"""Of the runs that are left out."""


@dataclass(frozen=True)
class ReportConfig:
    """Holds the fields that `python -m studies.report` takes.

    Attributes:
        runs: folders of records or of runs, as results/studies/STUDY/SCALE.
        output: the folder of the report; null: beside the records.
    """

    runs: tuple[Path, ...] = field(metadata=FIRST)
    output: Path | None = None


def load(folder: Path) -> tuple[Study, list[Record], dict[str, str]]:
    """Return the study of a folder, the records of its runs, and, by name, why other runs are left out.

    Records and runs are read as data. Nothing that they name is imported, composed or built.

    Raises:
        ConfigError: no study is there.
        Untrusted: its file cannot be read as one.
    """
    path = folder / "study.yaml"
    if not path.exists():
        valid = "the folder of a study's records or runs, as results/studies/STUDY/SCALE: it holds a study.yaml"
        raise ConfigError("RUNS", str(folder), valid)
    study = Study.load(path)
    records: list[Record] = []
    unfinished: dict[str, str] = {}
    _collect(study.runs(), folder, records, unfinished)
    _collect(judging_runs(study, records), folder, records, unfinished)
    return study, records, unfinished


def _collect(runs: Sequence[Planned], folder: Path, records: list[Record], unfinished: dict[str, str]) -> None:
    for run in runs:
        path = folder / f"{run.name}.json"
        try:
            if path.exists():
                records.append(_checked(Record.load(path), run, path))
            elif (folder / run.name / SUMMARY).exists():
                if not was_begun_as(run, folder / run.name):
                    raise UserError("its folder holds a run of other settings")
                records.append(collect(run, folder / run.name))
            elif (folder / run.name).exists():
                unfinished[run.name] = "it has not ended"
        except (UserError, OSError) as error:  # cut off, of another make, or something else
            unfinished[run.name] = str(error)


def _checked(record: Record, run: Planned, path: Path) -> Record:
    if (record.name, dict(record.point), record.seed) != (run.name, dict(run.point), run.seed):
        raise UserError(f"{path} is the record of another run ({record.name}, seed {record.seed})")
    if record.overrides != list(run.overrides):
        changed = sorted({*record.overrides} ^ {*run.overrides}) or ["the order"]
        raise UserError(f"{path} is the record of a run of other settings ({', '.join(changed)})")
    return record


def write(folder: Path, output: Path | None = None) -> Path:
    """Make the report, and return its path.

    Args:
        folder: of the records or runs.
        output: where the report and its pictures go; None: beside the records.

    Raises:
        UserError: there is no study, or the report cannot be written.
    """
    output = output or folder
    study, records, unfinished = load(folder)
    for name, reason in list(unfinished.items())[:NAMED]:
        print(f"Left out: {printable(name)}: {printable(reason)}", file=sys.stderr)
    blocks = compile_report(study, grids(study, records), list(unfinished), folder, output)
    report = output / "report.md"
    write_whole(report, lambda unfinished: unfinished.write_text(markdown(blocks)))
    write_whole(output / "report.html", lambda unfinished: unfinished.write_text(html(blocks, output)))
    return report


def compile_report(study: Study, known: Grids, unfinished: Sequence[str], folder: Path, output: Path) -> list[Block]:
    """Return what the report says; its pictures are drawn into `output`."""
    grid = known.every
    small = len(grid) <= MAX_DRAWN
    unit = loss_units(record for cell in grid.values() for record in cell.records)

    def draw(name: str, title: str, drawing: figures.Draw) -> Block:
        if not small:
            return Paragraph(f"{title}: not drawn, as the grid has more than {MAX_DRAWN} points.")
        drawing(output / f"{name}.png")
        return Picture(title, f"{name}.png")

    blocks: list[Block] = [
        Heading(f"{study.name}, {study.scale} scale", 1),
        Paragraph(study.question),
        _extent(study, grid, unfinished),
        Heading("Final validation loss"),
        Paragraph(f"In {unit}: mean ± standard deviation over seeds (how many){_which_seeds(study)}."),
        _table(study, known.selection),
        draw("map", "What each point came to", partial(figures.draw_map, study, known.selection)),
    ]
    if len(study.axes) > 1:
        blocks.append(draw("trend", "Across the second axis", partial(figures.draw_trend, study, known.selection)))
    for figure in _figures(grid):
        blocks += [Heading(f"Final {_in_words(figure)}"), *_figure_table(study, known.selection, figure)]
    if LEARNING_RATE in study.axes:
        blocks += [Heading("Each at its own best learning rate"), *_tuned_table(study, known, unit)]
        blocks.append(draw("rates", "Loss against learning rate", partial(figures.draw_rates, study, known)))
    if study.baseline is not None:
        blocks += [Heading(f"Against {study.baseline}"), *_comparisons(study, known)]
    blocks += [Heading("Stability"), *_stability(known.alike)]
    blocks += _outcomes(known.alike)
    blocks += [Heading("Training failure"), *_failures(grid)]
    blocks += [Heading("Curves"), draw("curves", "Training loss", partial(figures.draw_curves, study, grid))]
    blocks.append(Heading("Over depth"))
    columns = list(itertools.product(*list(study.axes.values())[1:]))
    for number, column in enumerate(columns[: MAX_DEPTH_PICTURES if small else 0]):
        name = _file_name("_".join(["depth", *column]), [block.file for block in blocks if isinstance(block, Picture)])
        title = f"Over depth: {' '.join(column)}"
        blocks.append(draw(name or f"depth_{number}", title, partial(figures.draw_depth, study, grid, column)))
    if small and len(columns) > MAX_DEPTH_PICTURES:
        blocks.append(Paragraph(f"Of {len(columns)} pictures the first {MAX_DEPTH_PICTURES} are drawn."))
    decays = _decays(grid)
    if decays:
        blocks += [Heading("Gradient decay, measured and predicted"), *_decay_table(decays)]
        blocks.append(draw("decay", "Gradient decay", partial(figures.draw_decay, _series(decays))))
    seconds = _seconds(known.alike)
    if seconds:
        blocks += [Heading("Cost"), draw("cost", "Time of a run", partial(figures.draw_cost, seconds))]
    return [*blocks, Heading("Runs"), *_origins(grid), *_runs_table(grid, folder, output)]


def _extent(study: Study, grid: dict[Point, Cell], unfinished: Sequence[str]) -> Paragraph:
    found = sum(len(cell.records) for cell in grid.values())
    planned = sum(cell.planned for cell in grid.values())
    failed = sum(len(cell.failed) for cell in grid.values())
    seeds = f"{len(study.select_seeds or study.seeds)} seeds"
    if study.select_seeds:
        seeds += f", and each best learning rate x {len(study.seeds)} other seeds"
    words: list[Inline] = [
        f"{planned} runs are planned ({' x '.join(study.axes)} x {seeds}); {found} have ended, of "
        f"which training failed in {failed}."
    ]
    if found < planned:
        words += [" ", Strong(f"{planned - found} are missing.")]
    if unfinished:
        more = f" and {len(unfinished) - NAMED} more" if len(unfinished) > NAMED else ""
        words.append(f" Half written, and left out: {', '.join(unfinished[:NAMED])}{more}.")
    return Paragraph([*words, " Every run: ", Code(" ".join(study.overrides)), f". Needs: {study.needs}."])


def _figures(grid: Mapping[Point, Cell]) -> list[str]:
    """Return the names of what was measured of held-out data beside the loss."""
    return list(dict.fromkeys(name for cell in grid.values() for record in cell.records for name in record.figures))


def _in_words(outcome: str) -> str:
    return "validation loss" if outcome == LOSS else outcome.replace("_", " ")


def _figure_table(study: Study, grid: Mapping[Point, Cell], name: str) -> list[Block]:
    words = f"Of held-out data: mean ± standard deviation over seeds (how many){_which_seeds(study)}."
    return [Paragraph(words), _table(study, of_outcome(grid, name))]


def _main_outcome(grid: Mapping[Point, Cell]) -> str:
    """Return by what the runs are compared: as their task says; where they have several, by the loss."""
    found = {record.main for cell in grid.values() for record in cell.records}
    return found.pop() if len(found) == 1 else LOSS


def _table(study: Study, grid: Mapping[Point, Cell]) -> Table:
    axes = list(study.axes.values())
    columns = list(itertools.product(*axes[1:]))
    rows = [[row, *(_linked(grid[(row, *column)]) for column in columns)] for row in axes[0]]
    return Table([" / ".join(study.axes), *(" ".join(column) for column in columns)], rows)


def _linked(cell: Cell) -> Words:
    return Link(str(cell), "#runs") if cell.records else str(cell)


def _which_seeds(study: Study) -> str:
    return ", of the seeds that select the learning rate" if study.select_seeds else ""


def _tuned_table(study: Study, known: Grids, unit: str) -> list[Block]:
    grid, best = known.selection, tuned(study, known.selection)
    at = list(study.axes).index(LEARNING_RATE)
    others = [axis for axis in study.axes if axis != LEARNING_RATE]
    rates = list(study.axes[LEARNING_RATE])
    rows: list[list[Words]] = []
    for point in itertools.product(*(study.axes[axis] for axis in others)):
        every = [grid[(*point[:at], rate, *point[at:])] for rate in rates]
        lasting = [rate for rate, cell in zip(rates, every, strict=True) if cell.mean is not None]
        if point not in best:
            words = "none without a failure" if any(cell.records for cell in every) else "no run yet"
            rows.append([" ".join(point), "-", words, "-", _sensitivity(every)])
            continue
        rate = best[point][at]
        edge = " (at the edge of the grid)" if rate in (rates[0], rates[-1]) else ""
        loss = str(known.judged[best[point]]) or "no run yet"
        rows.append([" ".join(point), f"{rate}{edge}", loss, ", ".join(lasting), _sensitivity(every)])
    header = [" / ".join(others), "best learning rate", "loss there", "rates without a failure", "sensitivity"]
    words = (
        f"Sensitivity (2309.14322): mean over the rates of the final loss less the best one's, in {unit}; a run "
        "that ends above the loss at the start counts as one that stayed there. It depends on the rates that were "
        "tried, and is small too where all are bad."
    )
    if study.select_seeds:
        selecting, judging = _listed(study.select_seeds), _listed(study.seeds)
        shorter = f" and {' '.join(study.select_overrides)}" if study.select_overrides else ""
        words = f"The rate is selected with seeds {selecting}{shorter}, the loss is that of seeds {judging}. {words}"
    else:
        words = f"The rate is selected by the seeds that judge it, which flatters each a little. {words}"
    return [Paragraph(words), Table(header, rows)]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _sensitivity(cells: Sequence[Cell]) -> str:
    """Return the mean over seeds of one scheme's sensitivity; cells are its learning rates'."""
    by_seed: dict[int, list[Record]] = {}
    for record in (record for cell in cells for record in cell.records):
        by_seed.setdefault(record.seed, []).append(record)
    whole = [records for records in by_seed.values() if len(records) == len(cells)]
    if not whole or len(cells) < 2:
        return "-"
    found = [
        learning_rate_sensitivity([r.val_loss for r in records], max(r.start for r in records)) for records in whole
    ]
    return f"{statistics.fmean(found):.3f}"


def _comparisons(study: Study, known: Grids) -> list[Block]:
    """Compare point by point, or, where learning rates are tuned, best against best."""
    assert study.baseline is not None
    tuning = LEARNING_RATE in study.axes
    outcome = _main_outcome(known.every)
    grid = of_outcome(known.judged, outcome)
    chosen = tuned(study, known.selection) if tuning else {point: point for point in grid}
    compared: list[tuple[Point, Comparison | None]] = []
    for point, ours in chosen.items():
        if point[0] != study.baseline and study.is_judged(point):
            theirs = chosen.get((study.baseline, *point[1:]))
            compared.append((point, compare(grid[ours], grid[theirs]) if theirs is not None else None))
    claims = [point for point, _ in compared if point[0] in study.family or not study.family]
    adjusted = dict(zip(claims, corrected([found for point, found in compared if point in claims]), strict=True))
    rows = [
        [*point, *_compared(found, point in adjusted, adjusted.get(point), study.least_difference, outcome != LOSS)]
        for point, found in compared
    ]
    axes = [axis for axis in study.axes if not (tuning and axis == LEARNING_RATE)]
    family = f"those of {', '.join(study.family)}" if study.family else "all rows"
    words = (
        f"Difference of the final {_in_words(outcome)}, paired by seed (how many), with its 95 % interval, and the "
        f"two-sided p of the paired t-test, corrected by Holm over {family}; below {SURE} it counts. Detectable is the "
        "true difference that this many seeds would find in four cases of five, by the deviation that was seen."
    )
    if study.least_difference:
        words += f" A difference of less than {study.least_difference:g} counts as none."
    words += " Each at its own best learning rate." if tuning else ""
    header = [*axes, "difference", "95 % interval", "p", "p, Holm", "detectable", "verdict"]
    return [Paragraph(words), Table(header, rows)]


def _compared(
    found: Comparison | None, claimed: bool, adjusted: float | None, least: float, more_is_better: bool
) -> list[str]:
    if found is None:
        return ["-", "-", "-", "-", "-", "failed in one of the two, or no seed in common"]
    difference = f"{found.difference:+.3f} ({found.seeds})"
    if found.interval is None or found.p is None or found.detectable is None:
        return [difference, "-", "-", "-", "-", "not told apart"]
    low, high = found.interval
    figures = [difference, f"{low:+.3f} to {high:+.3f}", f"{found.p:.3f}"]
    if not claimed or adjusted is None:
        return [*figures, "-", f"{found.detectable:.3f}", "no claim of this study"]
    better = "better" if (found.difference > 0) == more_is_better else "worse"
    told = adjusted < SURE and abs(found.difference) >= least
    return [*figures, f"{adjusted:.3f}", f"{found.detectable:.3f}", better if told else "not told apart"]


def _stability(grid: dict[Point, Cell]) -> list[Block]:
    words = (
        "Means over the runs of a point: spikes of the training loss in 10,000 steps, 99.9th percentile of the "
        "gradient norm before clipping, share of the steps that were clipped, largest activation in any block. A dash: "
        "older records have none of these, and a run of less than 201 steps has no spikes. Where the runs that judge a "
        "point are others than those that select, as longer ones, the figures are of the judging runs alone."
    )
    rows: list[list[Words]] = []
    partial_mean = False
    for point, cell in grid.items():
        columns = [[getattr(record, name) for record in cell.records] for name in COLUMN_NAMES]
        if any(value is not None for values in columns for value in values):
            rows.append([" ".join(point), *(_mean(values) for values in columns)])
            partial_mean |= any(0 < values.count(None) < len(values) for values in columns)
    words += " In brackets: of how many runs a mean is, where not of all." if partial_mean else ""
    header = ["", *COLUMN_NAMES.values()]
    return [Paragraph(words), Table(header, rows)] if rows else [Paragraph("These records have none of its figures.")]


def _outcomes(grid: dict[Point, Cell]) -> list[Block]:
    """Return what was measured of finished models, where something was; a point's runs that failed have nothing."""
    found = [(point, [_numbers(record.outcomes) for record in cell.records]) for point, cell in grid.items()]
    names = list(dict.fromkeys(name for _, records in found for outcomes in records for name in outcomes))
    if not names:
        return []
    words = (
        "Means over the runs of a point, with their standard deviation and number; docs/anatomy.md says what each is."
    )
    rows: list[list[Words]] = []
    for point, records in found:
        columns = [[outcomes[name] for outcomes in records if name in outcomes] for name in names]
        if any(columns):
            rows.append([" ".join(point), *(_spread(values) for values in columns)])
    return [Heading("Outcomes"), Paragraph(words), Table(["", *names], rows)]


def _numbers(outcomes: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in outcomes.items() if value is not None}


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{deviation} ({len(values)})"


def _mean(values: Sequence[float | None]) -> str:
    """Return the mean of those values that are known, and of how many it is where some are not."""
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    share = f" ({len(found)} of {len(values)})" if len(found) < len(values) else ""
    return f"{statistics.fmean(found):.3g}{share}"


def _failures(grid: dict[Point, Cell]) -> list[Block]:
    definition = Bullets([[Strong(name), f": {words}."] for name, words in FAILURES.items()])
    failed = [record for cell in grid.values() for record in cell.failed]
    rows = [[record.name, record.status, record.reason] for record in failed]
    found = Table(["run", "failure", "what it said"], rows) if rows else Paragraph("None of these runs failed.")
    blemished = [record for cell in grid.values() for record in cell.records if record.status in BLEMISHES]
    blocks: list[Block] = [
        Paragraph(["Training has failed (", Code("studies/record.py"), ") where"]),
        definition,
        found,
    ]
    if blemished:
        blocks += [
            Paragraph("These have not failed, and are marked:"),
            Bullets([[Strong(name), f": {words}."] for name, words in BLEMISHES.items()]),
            Table(["run", "mark"], [[record.name, record.status] for record in blemished]),
        ]
    return blocks


def _decays(grid: dict[Point, Cell]) -> dict[str, Decay]:
    """Return what the record of each point's first seed has noted; older records have not."""
    noted = {" ".join(point): cell.records[0].decay for point, cell in grid.items() if cell.records}
    return {label: decay for label, decay in noted.items() if decay is not None}


def _series(decays: Mapping[str, Decay]) -> dict[str, tuple[list[float], list[float] | None]]:
    return {label: (decay.measured, decay.predicted) for label, decay in decays.items()}


def _decay_table(decays: Mapping[str, Decay]) -> list[Block]:
    words = "Gradient norm of the hidden state after the first block over that after the last, at initialization."
    rows = [
        [label, f"{decay.measured[0]:.3g}", "no theory" if decay.predicted is None else f"{decay.predicted[0]:.3g}"]
        for label, decay in decays.items()
    ]
    return [Paragraph(words), Table(["", "measured", "predicted"], rows)]


def _seconds(grid: dict[Point, Cell]) -> dict[str, float]:
    found = {
        " ".join(point): [r.seconds for r in cell.records if r.seconds is not None] for point, cell in grid.items()
    }
    return {label: statistics.median(seconds) for label, seconds in found.items() if seconds}


def _origins(grid: dict[Point, Cell]) -> list[Block]:
    """Say on which code, versions, machines and corpora the runs were made, with how many on each."""
    records = [record for cell in grid.values() for record in cell.records]
    rows: list[list[Words]] = []
    for name in FIELDS:
        values = Counter(str(record.provenance[name]) for record in records if name in record.provenance)
        if values:
            rows.append([name, ", ".join(f"{value} ({count})" for value, count in values.most_common(NAMED))])
    return [Table(["made with", "runs"], rows)] if rows else [Paragraph("These records do not say what made them.")]


def _runs_table(grid: dict[Point, Cell], folder: Path, output: Path) -> list[Block]:
    rows: list[list[Words]] = []
    for cell in grid.values():
        for record in cell.records:
            run = _run_of(record)
            target = os.path.relpath(run if run is not None else folder / f"{record.name}.json", output)
            loss = "-" if record.val_loss is None else f"{record.val_loss:.4f}"
            seconds = "-" if record.seconds is None else f"{record.seconds:.0f}"
            rows.append([Link(record.name, target), record.status, loss, seconds])
    words = "Links lead to a run's folder where it is on this machine, and else to its record."
    return [Paragraph(words), Table(["run", "status", "validation loss", "seconds"], rows)]


def _run_of(record: Record) -> Path | None:
    """Return the run's folder if it is on this machine, below the working folder, and one of a run of this name."""
    path = Path(record.folder)
    try:
        inside = path.name == record.name and is_within(Path.cwd(), path)
        return path if inside and (path / "config.yaml").is_file() else None
    except (OSError, ValueError):  # a name that no file system takes
        return None


def _file_name(name: str, taken: Sequence[str]) -> str | None:
    """Return the name as one of a file; None: another picture has it."""
    fit = re.sub(r"[^\w.-]+", "-", name)[:200]
    return None if f"{fit}.png" in taken else fit


@cli.tool
def main(config: ReportConfig) -> None:
    for folder in config.runs:
        print(f"Report: {printable(write(folder, config.output), limit=None)}")


if __name__ == "__main__":
    cli.run(main)
