"""Says what the page of tools.watch shows, as plain values: runs, their curves, pictures and differences."""

import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.event_files import TABLES, event_files
from core.printable import printable
from core.untrusted import Untrusted
from tools.curves import Curve, from_one, read_curves, read_pictures
from tools.run_facts import as_text, differences, facts
from tools.runs import find, look

MAX_RUNS = 500
"""Runs that are listed: the newest."""
MAX_POINTS = 1000
"""Points of a curve."""
MAX_DIFFERENCES = 60
KEPT = 16
"""Runs whose curves are kept in memory."""
Signature = tuple[tuple[str, int, int], ...]


class Content:
    """Reads the runs below a folder for the page; a file is read again when it has changed.

    A run is asked for by the name that the list has given it: no path is ever made of what a browser sends.

    Args:
        folder: to look in.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs: dict[str, Path] = {}
        self._read: dict[Path, tuple[Signature, dict[str, Curve], dict[str, tuple[int, bytes]]]] = {}
        self._one_at_a_time = threading.Lock()

    def runs(self) -> dict[str, Any]:
        """Return the list of runs, the newest first."""
        now, folders = time.time(), find(self.folder)
        rows = [row for row in (look(folder, now) for folder in folders) if row is not None]
        rows = sorted(rows, key=lambda row: row.seconds)[:MAX_RUNS]
        self._runs = {self._name(row.folder): row.folder for row in rows}
        listed = [
            {
                "name": self._name(row.folder),
                "status": row.status,
                "step": row.step,
                "max_steps": row.max_steps,
                "val_loss": row.val_loss,
                "seconds": max(0.0, row.seconds),
                "reason": printable(row.reason),
            }
            for row in rows
        ]
        return {"folder": printable(self.folder), "runs": listed, "left_out": len(folders) - len(listed)}

    def _name(self, run: Path) -> str:
        return printable(run.relative_to(self.folder), limit=None) if run != self.folder else "."

    def find(self, name: str) -> Path | None:
        """Return the folder of a run that was listed; None: there is none of that name."""
        if name not in self._runs:
            self.runs()  # this process may have begun since the page was opened
        return self._runs.get(name)

    def curves(self, run: Path, tags: Sequence[str]) -> dict[str, Any]:
        """Return the names of all scalars and pictures of a run, and the curves that are asked for, thinned.

        Steps count from 1. A value that is no finite number is null. What cannot be read is said in `error`.
        """
        try:
            curves, pictures = self._files(run)
        except (Untrusted, OSError) as error:
            return {"tags": [], "curves": {}, "pictures": {}, "error": printable(error)}
        return {
            "tags": sorted(curves),
            "curves": {tag: _thinned(curves[tag]) for tag in tags if tag in curves},
            "pictures": {tag: step + 1 for tag, (step, _) in sorted(pictures.items())},
            "error": None,
        }

    def picture(self, run: Path, tag: str) -> bytes | None:
        """Return the newest picture of a tag, as PNG; None: there is none."""
        try:
            return self._files(run)[1].get(tag, (0, None))[1]
        except (Untrusted, OSError):
            return None

    def differences(self, runs: Sequence[Path]) -> dict[str, Any]:
        """Return the settings and origins that are not the same in all runs, a text for each run."""
        found = differences([facts(run) for run in runs])
        rows = [[printable(name), *(printable(as_text(value)) for value in values)] for name, values in found.items()]
        return {"rows": rows[:MAX_DIFFERENCES], "left_out": max(0, len(rows) - MAX_DIFFERENCES)}

    def _files(self, run: Path) -> tuple[dict[str, Curve], dict[str, tuple[int, bytes]]]:
        with self._one_at_a_time:
            signature = _signature(run)
            if run not in self._read or self._read[run][0] != signature:
                self._read.pop(run, None)
                while len(self._read) >= KEPT:
                    del self._read[next(iter(self._read))]  # the one that was read first
                self._read[run] = signature, read_curves(run), read_pictures(run)
            return self._read[run][1:]


def _signature(run: Path) -> Signature:
    found = []
    for path in (*event_files(run), *sorted(run.glob(TABLES))):
        state = path.stat()
        found.append((str(path), state.st_size, state.st_mtime_ns))
    return tuple(found)


def _thinned(curve: Curve) -> list[list[float | int | None]]:
    """Return [steps, values] of evenly chosen points, the first and the last among them."""
    steps, values = from_one(curve)
    count = min(len(steps), MAX_POINTS)
    chosen = [round(i * (len(steps) - 1) / max(count - 1, 1)) for i in range(count)]
    return [[steps[i] for i in chosen], [values[i] if math.isfinite(values[i]) else None for i in chosen]]
