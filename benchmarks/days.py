"""Keep what a comparison found on earlier days, so that a goal is judged by all of them and not by a lucky one."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import judged


def recorded(path: Path, machine: str, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Add what was found today to the records at this path, in the place of today's earlier ones of this machine.

    Args:
        machine: its name, without what changes by the hour.
        found: by title of a table, the fastest peer (`peer`), how many times as fast ours is (`speed`), the ends of its
            interval (`least`, `most`), and ours' memory as a part of the leanest peer's (`memory`).

    Returns:
        All records, the newest last: each with `date`, `machine` and `tables`.
    """
    today = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "tables": found}
    earlier: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    kept = [one for one in earlier if (one["date"], one["machine"]) != (today["date"], machine)]
    records = [*kept, today]
    path.write_text(json.dumps(records, indent=1) + "\n")
    return records


def judgement(records: list[dict[str, Any]], goals: dict[str, float]) -> Iterator[str]:
    """Yield a table of the days, and how each goal comes out: it is met where every day's interval lies above it."""
    for title, goal in goals.items():
        of_title = [(one, one["tables"][title]) for one in records if title in one["tables"]]
        if not of_title:
            continue
        yield f"{title}, goal {goal}:\n"
        yield "| day | fastest peer | ours is faster by | memory, of the leanest |\n|---|---|---|---|"
        for one, found in of_title:
            speed = f"{found['speed']:.2f} ({found['least']:.2f} to {found['most']:.2f})"
            yield f"| {one['date']}, {one['machine']} | {found['peer']} | {speed} | {found['memory']:.2f} |"
        least, most = min(found["least"] for _, found in of_title), max(found["most"] for _, found in of_title)
        yield f"\nAll days together {least:.2f} to {most:.2f}: {judged(least >= goal)}.\n"
