"""The generation benchmark on models that cost nothing: both agree, both are in the table, and the goal is judged."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import generation
from benchmarks.spending import Spending
from core.errors import ConfigError
from tests.support.models import TINY_MODELS

SPENT = {"ours": Spending({"aten::mm": 1.0}, 1)}


def test_it_runs_and_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "MODELS", TINY_MODELS)
    generation.main(["prompts=5,9", "batches=1,3", "num_tokens=4", "rounds=1", f"output={tmp_path}/generation.md"])
    rows = [line for line in (tmp_path / "generation.md").read_text().splitlines() if re.match(r"\| (mix|dense)", line)]
    (calls,) = [line for line in (tmp_path / "generation.md").read_text().splitlines() if "operators called" in line]
    assert all(int(cell.replace(",", "")) > 100 for cell in calls.split("|")[2:4])
    assert [row.split("|")[2].strip() for row in rows] == ["PlacementForCausalLM"] * 4 + ["LlamaForCausalLM"] * 4
    assert [[int(cell) for cell in row.split("|")[3:5]] for row in rows] == [[5, 1], [5, 3], [9, 1], [9, 3]] * 2
    assert len(re.findall(r"\*\*(met|missed)\*\*", (tmp_path / "generation.md").read_text())) == 2


def test_both_say_the_same_and_what_differs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = generation.make_pair(TINY_MODELS["dense"], 16, "cpu")
    prompts = torch.randint(generation.VOCAB_SIZE, (2, 6))
    generation.check_agreement(pair, prompts)
    assert generation.ours(pair, prompts, 5) == generation.theirs(pair, prompts, 5)
    with torch.no_grad():
        pair.theirs.lm_head.weight += 0.1
    with pytest.raises(AssertionError, match="not close"):
        generation.check_agreement(pair, prompts)


def test_the_goals_are_judged_by_the_worst() -> None:
    row = generation.Row("a", "Llama", 16, 1, 200.0, 100.0, [1.9, 2.1], (1.0, 2.0), 0.5, SPENT)
    slow = row._replace(model="b", ratios=[1.4, 3.0], first_ratio=1.2, spent={"ours": Spending({"aten::cat": 1e-3}, 7)})
    assert generation.verdict([row]).count("**met**") == 2
    assert "the least is 1.40 (b, prompt 16, batch 1)" in generation.verdict([row, slow])
    assert "the most is 1.20 (b, prompt 16, batch 1)" in generation.verdict([row, slow])
    assert generation.verdict([row, slow]).count("**missed**") == 2
    assert "Where the time of b, prompt 16, batch 1 goes" in generation.verdict([row, slow])
    assert generation.verdict([row, slow]).endswith(
        "| `aten::cat` | 100.0 % |\n| all, ms | 1.0 |\n| operators called | 7 |"
    )


def test_a_name_that_no_model_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="only='1T' is not valid: expected a part of one of the names default job"):
        generation.GenerationBenchmarkConfig(only="1T")
