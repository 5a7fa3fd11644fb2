"""The MoE benchmark at sizes that cost nothing: all contenders agree, and the file holds both tables."""

from pathlib import Path

import pytest

from benchmarks import moe

CONTENDERS = ("loop", "grouped", "padded bmm", "Mixtral, eager", "Mixtral, grouped_mm")


def test_it_runs_and_writes_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["experts=4", "tokens=256", "dim=16", "hidden=16", "layers=1", "rounds=1"]
    moe.main([*sizes, f"output={tmp_path}/moe.md"])
    text = (tmp_path / "moe.md").read_text()
    for name in CONTENDERS:
        assert text.count(f"| {name} |") == 2, "balanced and skewed"
    assert "ms per training step" in text
