"""The benchmark of a busy machine, at a size that costs little: real processes beside, and what is asked for."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import busy
from benchmarks.measure import take_turns
from tests.support.forked import server


def children() -> int:
    """How many processes this one has started that are still there."""
    return len(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def test_it_steps_beside_busy_processes_and_ends_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = server()
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)  # elsewhere each imports torch for itself
    monkeypatch.setattr(busy, "JOB", busy.JOB._replace(num_layers=1, dim=32, num_heads=2, hidden=16, seq_len=16))
    monkeypatch.setattr(busy, "WAYS", {busy.QUIET: (1, 1000), busy.BUSY: (1, 1000)})
    seen = []

    def turns(*arguments: Any) -> Any:
        seen.append(children())
        return take_turns(*arguments)

    monkeypatch.setattr(busy, "take_turns", turns)
    busy.main(["beside=[2]", "rounds=1", f"output={tmp_path}/busy.md"])
    alone, beside = seen
    assert beside == alone + 2
    assert children() <= alone
    text = (tmp_path / "busy.md").read_text()
    assert text.count("\n| 0 | ") == text.count("\n| 2 | ") == 1
    assert text.count("**met**") + text.count("**missed**") == 1


def test_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert [busy.wanted(number, 1000.0) for number in (0, 1, 2, 8)] == [None, 620.0, 350.0, 140.0]
    rows = [busy.Row(0, [9.0, 1.0, 1.0], None), busy.Row(1, [1.0, 6.0, 1.0], 6.0), busy.Row(2, [9.0, 2.0, 9.0], 3.0)]
    assert busy.verdict(rows) == "Goals: 1 of 2 met.", "of how a run waits that begins so"
