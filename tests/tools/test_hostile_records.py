"""Recorded steps and events from a stranger in tools.replay: read as data of the right types, or refused in a line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from core.errors import UserError
from tools.replay import check_distance, checkpoint_before, load_record, recorded_steps, rollbacks


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


STEP = {"step": 3, "samples": [0, 7], "losses": [1.0], "grad_norm": 1.0, "norms": [1.0], "nonfinite": [0.0]}
RECORD: dict[str, Any] = {
    "reason": "x",
    "step": 3,
    "samples": [0, 7],
    "world_size": 1,
    "groups": [[1, "attn"]],
    "steps": [STEP],
    "batches": [{"tokens": torch.zeros(2, 5, dtype=torch.int64)}],
}


def test_a_record_is_read(tmp_path: Path) -> None:
    torch.save(RECORD, tmp_path / "step_3_rank_0.pt")
    assert load_record(tmp_path / "step_3_rank_0.pt")["steps"] == [STEP]


@pytest.mark.parametrize(
    "change",
    [
        {"reason": 3},
        {"step": "3"},
        {"world_size": None},
        {"samples": ["\x1b", 1]},
        {"samples": [1]},
        {"batches": [3]},
        {"batches": [{}]},
        {"batches": [{"tokens": "x"}]},
        {"steps": [3]},
        {"steps": [{**STEP, "grad_norm": "x"}]},
        {"steps": [{**STEP, "losses": ["x"]}]},
        {"steps": [{**STEP, "nonfinite": []}]},
        {"groups": [3]},
        {"groups": []},
    ],
    ids=repr,
)
def test_an_odd_record_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "step_3_rank_0.pt"
    torch.save({**RECORD, **change}, path)
    with pytest.raises(UserError, match=rf"^{path} cannot be read as a recorded step: [^\n]*$"):
        load_record(path)


@pytest.mark.parametrize("content", [[], 3, None, "x", {}, {1: 2}], ids=repr)
def test_what_is_no_record_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "step_3_rank_0.pt")
    with pytest.raises(UserError, match="cannot be read as a recorded step"):
        load_record(tmp_path / "step_3_rank_0.pt")


def test_code_in_a_record_is_not_run(tmp_path: Path) -> None:
    torch.save({**RECORD, "reason": Canary(tmp_path / "canary")}, tmp_path / "step_3_rank_0.pt")
    with pytest.raises(UserError, match="cannot be read as a recorded step"):
        load_record(tmp_path / "step_3_rank_0.pt")
    assert not (tmp_path / "canary").exists()


def test_pipes_are_no_records(tmp_path: Path) -> None:
    (tmp_path / "flight_recorder").mkdir()
    os.mkfifo(tmp_path / "flight_recorder/step_3_rank_0.pt")
    assert recorded_steps(tmp_path) == {}


@pytest.mark.parametrize(
    "line",
    [
        "x",
        "[]",
        "3",
        "{}",
        "[" * 5000 + "]" * 5000,
        json.dumps({"step": "x", "done": "rolled back to step 3"}),
        json.dumps({"step": 1, "done": 3}),
        json.dumps({"step": -1, "done": "x"}),
        json.dumps({"step": 2**70, "done": "x"}),
        "",
    ],
)
def test_odd_events_are_refused_with_their_line(tmp_path: Path, line: str) -> None:
    good = json.dumps({"step": 9, "done": "rolled back to step 3, then on", "more": 1})
    (tmp_path / "events.jsonl").write_text(f"{good}\n")
    assert rollbacks(tmp_path) == [(9, 3)]
    (tmp_path / "events.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError, match=rf"^{tmp_path}/events.jsonl, line 2 cannot be read: [^\n]*$"):
        rollbacks(tmp_path)


def test_events_have_a_bound(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").touch()
    os.truncate(tmp_path / "events.jsonl", 65 << 20)
    with pytest.raises(UserError, match=r"has more than 67,108,864 bytes; the bound is 67,108,864, and READ_LIMITS=10"):
        rollbacks(tmp_path)


def test_events_in_a_pipe_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "events.jsonl")
    with pytest.raises(UserError, match="is no regular file"):
        rollbacks(tmp_path)


@pytest.mark.parametrize("step", ["x/../../PWN", 1.5, True, -1, None], ids=repr)
def test_a_checkpoint_of_an_odd_step_is_refused(tmp_path: Path, step: Any) -> None:
    (tmp_path / "checkpoints").mkdir()
    torch.save({"global_step": step}, tmp_path / "checkpoints/last.ckpt")
    with pytest.raises(UserError, match="global_step"):
        checkpoint_before(tmp_path, 5)


@pytest.mark.parametrize(
    ("max_steps", "step", "at", "recorded", "reason"),
    [
        (100, 50, 40, [50, 50], None),
        (100, 50, 40, [50, 51], "step=50 is not valid: expected a step whose record is of that step"),
        (100, 101, 40, [101], "step=101 is not valid: expected at most 100, trainer.max_steps"),
        (10**9, 10_001, 0, [10_001], None),
        (-1, 10_002, 0, [10_002], "10,001 steps behind the newest checkpoint .* the bound is 10,000, and READ_LIMITS"),
        (10**9, 999_999_999, 3, [999_999_999], "999,999,995 steps behind"),
    ],
)
def test_a_step_is_one_that_the_run_came_to_and_near(
    max_steps: int, step: int, at: int, recorded: list[int], reason: str | None
) -> None:
    config = OmegaConf.create({"trainer": {"max_steps": max_steps}})
    records = [{"step": each} for each in recorded]
    if reason is None:
        check_distance(config, step, at, records)
        return
    with pytest.raises(UserError, match=reason):
        check_distance(config, step, at, records)
