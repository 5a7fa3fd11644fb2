"""Writes what was found of runs: report.md with its pictures, report.json, and TensorBoard's events."""

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from analysis.anatomy.bootstrap import FEWEST, LEVEL, Interval, Resampled
from analysis.anatomy.findings import Findings, Picture, as_plain
from analysis.anatomy.held_out import HeldOut
from analysis.anatomy.registry import INSTRUMENTS
from core.errors import writing
from studies.document import Block, Bullets, Code, Heading, Paragraph, Table, Words, markdown
from studies.document import Picture as Shown
from tools.examination.examine import Examined
from tools.examination.pictures import draw
from tools.examination.steps import Kept, draw_drops, draw_scalars, has_drops, has_scalars
from tools.run_labels import labels

SHAPE = ("step", "placement", "num_layers", "dim", "ffn", "parameters", "document_mask")


@dataclass(frozen=True)
class Report:
    """Everything that a report says.

    Attributes:
        data: the held-out data.
        examined: the runs, in order; the others are compared with the first.
        source: where the data come from, in words.
        kept: of each run, what was kept while it was trained.
    """

    data: HeldOut
    examined: Sequence[Examined]
    source: str
    kept: Sequence[Sequence[Kept]]

    @cached_property
    def labels(self) -> list[str]:
        """A name for each run."""
        return labels([run.folder for run in self.examined], [run.checkpoint for run in self.examined])

    @cached_property
    def resampled(self) -> Resampled:
        """The draws of documents that every interval is of."""
        return Resampled(self.data.targets_by_document)

    def measures(self) -> Iterator[tuple[str, dict[str, Findings]]]:
        """Yield each measure's name with its findings by the run's label, of the runs that have some."""
        for name in INSTRUMENTS:
            pairs = zip(self.labels, self.examined, strict=True)
            found = {label: run.findings[name] for label, run in pairs if name in run.findings}
            if found:
                yield name, found

    def intervals(self, found: dict[str, Findings]) -> dict[str, dict[str, list[Interval]]]:
        """Return the intervals of one measure's figures: by label, then by the figure's name."""
        return {
            label: {
                name: self.resampled.intervals(sums, findings.counts.get(name))
                for name, sums in findings.by_document.items()
            }
            for label, findings in found.items()
        }

    def differences(self, found: dict[str, Findings]) -> dict[str, dict[str, list[Interval]]]:
        """Return the intervals of the differences to the first run, where figures have as many points as its."""
        first = found.get(self.labels[0])
        return {
            label: {
                name: self.resampled.differences(
                    sums, first.by_document[name], findings.counts.get(name), first.counts.get(name)
                )
                for name, sums in findings.by_document.items()
                if name in first.by_document and first.by_document[name].shape == sums.shape
            }
            for label, findings in found.items()
            if first is not None and findings is not first
        }


def write(report: Report, output: Path) -> Path:
    """Write the whole report into a new folder, all of it or nothing, and return the path of report.md.

    Raises:
        ConfigError: the file system refuses it.
    """
    with writing("output", output):
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        try:
            text = markdown(list(_blocks(report, scratch)))
            (scratch / "report.md").write_text(text)
            (scratch / "report.json").write_text(json.dumps(content_of(report), allow_nan=False) + "\n")
            write_events(report, scratch)
            scratch.chmod(0o755)
            scratch.rename(output)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    return output / "report.md"


def _blocks(report: Report, output: Path) -> Iterator[Block]:
    data = report.data
    yield Heading("Anatomy", 1)
    yield Paragraph(
        f"{_size(data)}, of {report.source}; the same for every run. Losses are in {data.task.loss_unit}. "
        f"{_about_intervals(data)}"
    )
    header = ["run", "folder", "checkpoint", "step", "placement", "FFN", "blocks", "dim", "parameters"]
    rows: list[list[Words]] = [
        [
            label,
            Code(str(run.folder)),
            Code(run.checkpoint.name),
            f"{run.step:,}",
            run.placement,
            run.ffn,
            str(run.num_layers),
            str(run.dim),
            f"{run.parameters:,}",
        ]
        for label, run in zip(report.labels, report.examined, strict=True)
    ]
    yield Table(header, rows)
    apart = [label for label, run in zip(report.labels, report.examined, strict=True) if run.document_mask]
    if 0 < len(apart) < len(report.examined):
        yield Paragraph(
            f"Each run reads the text as it was trained: attention keeps documents apart (data.document_mask) in "
            f"{', '.join(apart)}, and crosses them in the others."
        )
    yield Heading("In numbers")
    yield from _scalars(report)
    for name, found in report.measures():
        yield Heading(name.replace("_", " "))
        about = INSTRUMENTS[name].about
        yield Paragraph(f"{about[:1].upper()}{about[1:]}.")
        notes = dict.fromkeys(note for findings in found.values() for note in findings.notes)
        if notes:
            yield Bullets(list(notes))
        intervals = report.intervals(found)
        for picture in _pictures(found):
            shown = {label: findings for label, findings in found.items() if picture in findings.pictures}
            draw(picture, shown, intervals, output / f"{picture.name}.png")
            yield Shown(picture.title, f"{picture.name}.png")
        yield from _curves(found, intervals)
    yield from _over_steps(report, output)
    missing = [
        f"{name}, {label}: {reason}"
        for label, run in zip(report.labels, report.examined, strict=True)
        for name, reason in run.left_out.items()
    ]
    if missing:
        yield Heading("Not measured")
        yield Bullets(missing)


def _size(data: HeldOut) -> str:
    task, targets, positions = data.task, data.num_targets, data.num_positions
    seen = "" if targets == positions else f" ({positions:,} positions)"
    return f"{targets:,} {task.counted}{seen}" + (
        "" if task.counted == task.documents else f" of {data.num_documents:,} {task.documents}"
    )


def _about_intervals(data: HeldOut) -> str:
    documents = data.task.documents
    if data.num_documents < FEWEST:
        return (
            f"There are no intervals: bootstrap over {documents} takes at least {FEWEST}, as those of fewer come out "
            f"too narrow, and that of one without any width. More tokens= have more {documents}."
        )
    return (
        f"In brackets: {LEVEL:.0%} intervals by bootstrap over {documents}, which say how much hangs on the data, and "
        "nothing of how another seed of training would have come out."
    )


def _over_steps(report: Report, output: Path) -> Iterator[Block]:
    """Yield what was kept of the runs while they were trained, of those that have kept something."""
    kept = {label: steps for label, steps in zip(report.labels, report.kept, strict=True) if len(steps) > 1}
    scalars = {label: steps for label, steps in kept.items() if has_scalars(steps)}
    drops = {label: steps for label, steps in kept.items() if has_drops(steps)}
    if not scalars and not drops:
        return
    yield Heading("Over training")
    yield Paragraph("What callbacks=anatomy has kept, on data of its own: the first of validation.")
    if scalars:
        draw_scalars(scalars, output / "steps_scalars.png")
        yield Shown("scalars over steps", "steps_scalars.png")
    if drops:
        draw_drops(drops, output / "steps_drops.png")
        yield Shown("loss without each block over steps", "steps_drops.png")


def _pictures(found: dict[str, Findings]) -> list[Picture]:
    return list(dict.fromkeys(picture for findings in found.values() for picture in findings.pictures))


def _scalars(report: Report) -> Iterator[Block]:
    rows: list[list[Words]] = []
    against: list[list[Words]] = []
    for _, found in report.measures():
        intervals, differences = report.intervals(found), report.differences(found)
        for name in dict.fromkeys(name for findings in found.values() for name in findings.scalars):
            cells = []
            for label in report.labels:
                value = found[label].scalars.get(name) if label in found else None
                known = intervals.get(label, {}).get(name)
                cells.append("-" if value is None else _number(value) if known is None else _interval(known[0]))
            rows.append([Code(name), *cells])
            if any(name in part for part in differences.values()):
                changes = (differences.get(label, {}).get(name) for label in report.labels[1:])
                against.append([Code(name), *("-" if change is None else _interval(change[0]) for change in changes)])
    yield Table(["", *report.labels], rows)
    if against:
        yield Paragraph(f"Less that of {report.labels[0]}, over the same {report.data.task.documents}:")
        yield Table(["", *report.labels[1:]], against)


def _curves(found: dict[str, Findings], intervals: dict[str, dict[str, list[Interval]]]) -> Iterator[Block]:
    """Yield a table of each curve: a row for each place, a column for each run."""
    for name in dict.fromkeys(name for findings in found.values() for name in findings.curves):
        curves = {label: findings.curves[name] for label, findings in found.items() if name in findings.curves}
        over = next(iter(curves.values())).over
        places = sorted({place for curve in curves.values() for place in curve.places})
        rows: list[list[Words]] = []
        for place in places:
            row: list[Words] = [str(place)]
            for label, curve in curves.items():
                number = place - curve.first
                known = intervals[label].get(name)
                if not 0 <= number < len(curve.values):
                    row.append("-")
                else:
                    row.append(_number(curve.values[number]) if known is None else _interval(known[number]))
            rows.append(row)
        yield Heading(name.replace("_", " "), 3)
        yield Table([over, *curves], rows)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _interval(interval: Interval) -> str:
    bounds = "" if math.isnan(interval.low) else f" ({_number(interval.low)} to {_number(interval.high)})"
    return f"{_number(interval.value)}{bounds}"


def content_of(report: Report) -> dict[str, Any]:
    """Return all of a report as JSON has it; what is no finite number is null."""
    runs = []
    measured, counted = dict(report.measures()), report.data.task.counted
    for label, run in zip(report.labels, report.examined, strict=True):
        shape = {name: getattr(run, name) for name in SHAPE}
        runs.append(
            {
                "label": label,
                "folder": str(run.folder),
                "checkpoint": str(run.checkpoint),
                **shape,
                "findings": {name: findings.as_plain() for name, findings in run.findings.items()},
                "left_out": run.left_out,
            }
        )
    return {
        "text": {
            "source": report.source,
            counted: report.data.num_targets,
            f"{counted}_by_document": as_plain(report.data.targets_by_document),
        },
        "runs": runs,
        "intervals": {name: as_plain(report.intervals(found)) for name, found in measured.items()},
        "differences": {name: as_plain(report.differences(found)) for name, found in measured.items()},
    }


def write_events(report: Report, output: Path) -> None:
    """Write scalars and curves of each run, and the pictures, for TensorBoard; a curve's step is its place."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import SummaryWriter

    for label, run in zip(report.labels, report.examined, strict=True):
        with SummaryWriter(output / "tensorboard" / label.replace("/", "_")) as writer:
            for name, findings in run.findings.items():
                for scalar, value in findings.scalars.items():
                    writer.add_scalar(f"{name}/{scalar}", value, run.step)
                for curve, points in findings.curves.items():
                    for place, value in zip(points.places, points.values, strict=True):
                        writer.add_scalar(f"{name}/{curve}", value, place)
    with SummaryWriter(output / "tensorboard" / "pictures") as writer:
        for name, found in report.measures():
            for picture in _pictures(found):
                content = (output / f"{picture.name}.png").read_bytes()
                image = Summary.Image(encoded_image_string=content)
                value = Summary.Value(tag=f"{name}/{picture.name}", image=image)
                writer.file_writer.add_summary(Summary(value=[value]), report.examined[0].step)
