"""The curves that a run's loggers left: TensorBoard's event files, CSV tables, or both."""

import csv
from collections.abc import Iterator
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curve = tuple[list[int], list[float]]
"""Optimizer steps, and the value at each."""

TABLES = "csv/version_*/metrics.csv"


def has_curves(run: Path) -> bool:
    """Whether the folder is one of a run under logger=tensorboard or logger=csv."""
    return (run / "tensorboard").is_dir() or any(run.glob(TABLES))


def read_curves(run: Path) -> dict[str, Curve]:
    """{tag: its curve}. Where a resumed run went over a step again, the later value counts."""
    found: dict[str, dict[int, float]] = {}
    for tag, step, value in (*_of_tables(run), *_of_events(run)):
        found.setdefault(tag, {})[step] = value
    return {tag: (sorted(values), [values[step] for step in sorted(values)]) for tag, values in found.items()}


def _of_tables(run: Path) -> Iterator[tuple[str, int, float]]:
    for path in sorted(run.glob(TABLES), key=lambda path: int(path.parent.name.removeprefix("version_"))):
        with path.open() as file:
            for row in csv.DictReader(file):
                step = int(row.pop("step"))
                yield from ((tag, step, float(value)) for tag, value in row.items() if value)


def _of_events(run: Path) -> Iterator[tuple[str, int, float]]:
    if not (run / "tensorboard").is_dir():
        return
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    for tag in events.Tags()["scalars"]:
        yield from ((tag, event.step, event.value) for event in events.Scalars(tag))
