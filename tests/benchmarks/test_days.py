"""What a comparison found is kept by day and machine, and a goal is met only if each of them meets it."""

import json
import time
from pathlib import Path

import pytest

from benchmarks import days

GOOD = {"peer": "litgpt", "speed": 1.2, "least": 1.1, "most": 1.3, "memory": 0.8}
WIDE = {"peer": "Mixtral", "speed": 1.15, "least": 0.9, "most": 1.4, "memory": 1.1}


def test_goals_are_judged_by_the_worst_day_and_a_day_done_again_replaces_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "benchmark.json"
    for date, machine, found in [
        ("2026-01-01", "A", {"Dense": WIDE, "Mixture": GOOD}),
        ("2026-01-02", "B", {"Dense": WIDE, "Mixture": GOOD}),
        ("2026-01-02", "A", {"Dense": GOOD}),
        ("2026-01-02", "B", {"Dense": GOOD, "Mixture": GOOD}),
    ]:
        monkeypatch.setattr(time, "strftime", lambda _, date=date: date)
        records = days.recorded(path, machine, found)
    assert [(one["date"], one["machine"]) for one in records] == [
        ("2026-01-01", "A"),
        ("2026-01-02", "A"),
        ("2026-01-02", "B"),
    ]
    assert json.loads(path.read_text()) == records
    text = "\n".join(days.judgement(records, {"Dense": 1.1, "Mixture": 1.1, "Never measured": 1.1}))
    assert "| 2026-01-01, A | Mixtral | 1.15 (0.90 to 1.40) | 1.10 |" in text
    dense, mixture = text.split("Mixture, goal 1.1:")
    assert "All days together 0.90 to 1.40: **missed**" in dense
    assert "All days together 1.10 to 1.30: **met**" in mixture
    assert mixture.count("| 2026-") == 2, "the days on which it was measured"
    assert "Never measured" not in text
