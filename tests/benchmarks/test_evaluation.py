"""The benchmark of evaluation on models that cost nothing: both agree, both are in the table, and goals are judged."""

from pathlib import Path

import pytest
import torch

from benchmarks import evaluation
from benchmarks.generation import make_pair
from benchmarks.spending import Spending
from tests.support.models import TINY_MODELS


def test_it_runs_and_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "MODELS", TINY_MODELS)
    monkeypatch.setattr(evaluation, "WINDOW", 64)
    evaluation.main(["questions=8", "rounds=1", f"output={tmp_path}/evaluation.md"])
    text = (tmp_path / "evaluation.md").read_text()
    for name in TINY_MODELS:
        for kind in ("questions, four answers each", "long contexts", "a text by windows"):
            assert f"M | {kind} |" in text, name
    assert "operators called" in text
    assert text.count("**met**") + text.count("**missed**") == 2


def test_answers_that_differ_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "WINDOW", 64)
    pair = make_pair(TINY_MODELS["dense"], 64, "cpu")
    both, requests = evaluation.contenders(pair, "cpu"), evaluation.workloads(8)["long contexts"]
    with torch.no_grad():
        pair.theirs.lm_head.weight[:5] += 1.0
    with pytest.raises(AssertionError, match="not close"):
        evaluation.check_agreement({who: evaluation.answer(model, requests) for who, model in both.items()})


def test_memory_is_that_of_the_most_at_once() -> None:
    def twice() -> None:
        for _ in range(2):
            first = torch.ones(1000)
            first += torch.ones(1000)

    assert evaluation.peak_bytes(twice) == pytest.approx(8000, abs=200)


def test_the_goals_are_judged_by_the_worst() -> None:
    row = evaluation.Row("a", "long", 200.0, 100.0, [1.9, 2.1], (5, 10), {"ours": Spending({"aten::mm": 1.0}, 1)})
    slow = row._replace(model="b", ratios=[1.1, 3.0], memory=(12, 10))
    assert evaluation.verdict([row]).count("**met**") == 2
    assert "the least is 1.10 (b, long)" in evaluation.verdict([row, slow])
    assert "the most is 1.20 (b, long)" in evaluation.verdict([row, slow])
