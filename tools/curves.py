"""The curves that a run's loggers left: TensorBoard's event files, CSV tables, or both.

A run may come from anywhere. Its files are held against bounds before a library reads them, and what is no curve of a
run is refused in a line that names the file.
"""

import csv
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from core.errors import one_line
from core.event_files import OVERVIEW, TABLES, event_files
from core.untrusted import MIB, Untrusted, beyond, bound

Curve = tuple[list[int], list[float]]
"""Optimizer steps as loggers number them, from 0, and the value at each."""

PNG = b"\x89PNG\r\n\x1a\n"
FILE_BYTES = 4096 * MIB
"""Of all the files of a run's curves together."""
RECORD_BYTES = 4 * MIB
"""Of one event, which TensorBoard's reader allocates before it sees whether the file is that long, and of which it
makes up to 50 times as much. A run's histograms have 10 kB."""
LINE_CHARACTERS = 1 << 20
"""Of a line of a table, which is held in memory whole; a run's have a few thousand."""
MAX_EVENTS = 10_000_000
"""Of all the event files of a run together: each takes time to step over."""
MAX_VALUES = 10_000_000
"""Of all the curves of a run together, in each kind of file."""
MAX_CELLS = 100_000_000
"""Of all the tables of a run together, empty ones included: a row has one for each column, however short it is."""
FRAME, CHECKSUM = 12, 4  # bytes before and after an event: its length and that one's checksum, its own checksum
MAX_STEP = 10**15


def read_curves(run: Path) -> dict[str, Curve]:
    """Return {tag: its curve}. Where a resumed run went over a step again, the later value counts.

    Raises:
        Untrusted: a file is none of a run's curves, or beyond a bound.
    """
    found: dict[str, dict[int, float]] = {}
    for tag, step, value in (*_of_tables(run), *_of_events(run)):
        found.setdefault(tag, {})[step] = value
    return {tag: (sorted(values), [values[step] for step in sorted(values)]) for tag, values in found.items()}


def from_one(curve: Curve) -> Curve:
    """Return the curve with its steps counted from 1, as everything else counts them that a person sees."""
    steps, values = curve
    return [step + 1 for step in steps], values


def _of_tables(run: Path) -> Iterator[tuple[str, int, float]]:
    numbered = ((re.fullmatch(r"version_(\d{1,15})", path.parent.name), path) for path in run.glob(TABLES))
    paths = [path for number, path in sorted((int(match[1]), path) for match, path in numbered if match)]
    _check_sizes(run, paths)
    cells = values = 0
    for path in paths:
        with path.open(newline="", errors="replace") as file:
            try:
                records = (_record(line) for line in _lines(file, path))
                header = next(records, [])
                for record in records:
                    if not record:  # an empty line
                        continue
                    row = dict(zip(header, record, strict=False))
                    cells += max(len(header), len(record))
                    _require_at_most(MAX_CELLS, cells, f"{path}: the run's tables have too many cells")
                    step = _step(row.pop("step"))
                    found = [(tag, step, float(value)) for tag, value in row.items() if tag and value]
                    values += len(found)
                    _require_at_most(MAX_VALUES, values, f"{path}: the run's tables have too many values")
                    yield from found
            except (csv.Error, ValueError, TypeError, KeyError) as error:
                reason = f"there is no column {error}" if isinstance(error, KeyError) else one_line(error)
                raise Untrusted(f"{path} cannot be read as a table of curves: {reason}") from error


def _require_at_most(most: int, number: int, what: str) -> None:
    if number > bound(most):
        raise Untrusted(beyond(what, most))


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    """Yield the lines of a table but for the last one where it may still be written."""
    limit = bound(LINE_CHARACTERS)
    while line := file.readline(limit + 1):
        if len(line) > limit:
            raise Untrusted(beyond(f"{path} has a line of more than {limit:,} characters", LINE_CHARACTERS))
        if line.endswith("\n"):
            yield line


def _record(line: str) -> list[str]:
    """Return the cells of a line. No record goes on in the next line: it would grow before anything is counted.

    Raises:
        csv.Error: it ends within quotes, or is no line of a table.
    """
    (record,) = csv.reader([line], strict=True)
    return record


def _step(text: str | None) -> int:
    step = int(text or "")
    if not 0 <= step <= MAX_STEP:
        raise ValueError(f"step {step} is none of 0 to {MAX_STEP}")
    return step


def read_pictures(run: Path) -> dict[str, tuple[int, bytes]]:
    """Return {tag: (step, PNG)}: of each picture in a run's event files the newest.

    Raises:
        Untrusted: a file is none of TensorBoard's, or beyond a bound.
    """
    found: dict[str, tuple[int, bytes]] = {}
    for path, step, value in _event_values(run):
        content = value.image.encoded_image_string if value.HasField("image") else b""
        if content.startswith(PNG) and step >= found.get(value.tag, (0, b""))[0]:
            found[value.tag] = _event_step(path, value.tag, step), content
    return found


def _of_events(run: Path) -> Iterator[tuple[str, int, float]]:
    for path, step, value in _event_values(run):
        # Neither a histogram nor a text, nor one of those that stand there twice.
        if value.HasField("simple_value") and not value.tag.startswith(f"{OVERVIEW}/"):
            yield value.tag, _event_step(path, value.tag, step), value.simple_value


def _event_values(run: Path) -> Iterator[tuple[Path, int, Any]]:
    """Yield (file, step, value) of all that was written for TensorBoard, each of protobuf's kind Summary.Value."""
    paths = event_files(run)
    _check_sizes(run, paths)
    left = bound(MAX_EVENTS)
    for path in paths:
        left -= _check_frames(path, left)
    values = 0
    for path in paths:
        try:
            for event in LegacyEventFileLoader(str(path)).Load():
                values += len(event.summary.value)
                _require_at_most(MAX_VALUES, values, f"{path}: the run's event files have too many values")
                yield from ((path, event.step, value) for value in event.summary.value)
        except Untrusted:
            raise
        except Exception as error:  # of protobuf's and TensorBoard's kinds
            raise Untrusted(f"{path} cannot be read as TensorBoard's events: {one_line(error)}") from error


def _event_step(path: Path, tag: str, step: int) -> int:
    if not 0 <= step <= MAX_STEP:
        raise Untrusted(f"{path}: {tag[:200]} has a step {step}, which is none of 0 to {MAX_STEP}")
    return step


def _check_sizes(run: Path, paths: list[Path]) -> None:
    total = 0
    for path in paths:
        found = path.stat() if path.exists() else None
        if found is None or not stat.S_ISREG(found.st_mode):
            raise Untrusted(f"{path} is no regular file")
        total += found.st_size
    if total > bound(FILE_BYTES):
        raise Untrusted(beyond(f"the curves of {run} have {total:,} bytes", FILE_BYTES))


def _check_frames(path: Path, most: int) -> int:
    """Go from event to event without reading any, and count them; the last may be cut off, as its run may go on.

    Raises:
        Untrusted: one is too long, or there are more than `most`.
    """
    size, count = path.stat().st_size, 0
    with path.open("rb") as file:
        at = 0
        while at + FRAME <= size:
            file.seek(at, os.SEEK_SET)
            frame = file.read(FRAME)
            if frame == bytes(FRAME):  # as a crash leaves them; no checksum is like that, and TensorBoard stops there
                break
            length = int.from_bytes(frame[:8], "little")
            if length > bound(RECORD_BYTES):
                raise Untrusted(beyond(f"{path} has an event of {length:,} bytes", RECORD_BYTES))
            count += 1
            if count > most:
                raise Untrusted(beyond(f"{path}: the run's event files have too many events", MAX_EVENTS))
            at += FRAME + length + CHECKSUM
    return count
