"""How many hours a study has taken, and how many it will."""

from pathlib import Path

import pytest

from studies.grid import Planned
from studies.record import Record
from studies.status import broken_off, hours


def done(scheme: str, steps: int, seconds: float | None, overrides: tuple[str, ...] = ()) -> Record:
    curve = ([1, steps], [3.0, 2.0])
    name = f"{scheme}_{steps}"
    return Record(name, {"x": scheme}, 0, list(overrides), "finished", "runs/x", seconds=seconds, train_loss=curve)


def waits(scheme: str, *overrides: str) -> Planned:
    return Planned(f"{scheme}_0", {"x": scheme}, 0, overrides)


def test_a_run_to_come_takes_as_long_per_step_as_its_scheme_has() -> None:
    ended = [done("slow", 100, 7200.0), done("fast", 100, 1800.0)]
    text = "Trained for 2.5 hours; about {} are left, one run after the other."
    assert hours(ended, [waits("slow"), waits("fast")]) == text.format("2.5 hours")
    assert hours(ended, [waits("fast", "trainer.max_steps=9", "trainer.max_steps=200")]) == text.format("1.0 hours")
    assert hours(ended, [waits("unknown", "trainer.max_steps=10")]) == text.format("8 minutes"), "72 and 18 a step"


def test_without_a_run_to_go_by_nothing_is_said() -> None:
    assert hours([], [waits("fast")]) == "Trained for 0 minutes; nothing says yet how long the rest will take."
    assert hours([done("fast", 10, 60.0)], []) == "Trained for 1 minutes; nothing is left."


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ('{"status": "running", "step": 7}', "killed at step 7: resumes"),
        ('{"status": "stopped", "step": 3}', "stopped at step 3: resumes"),
        ('{"status": "done", "step": 9}', "broken off at step 9: resumes"),
    ],
)
def test_a_run_that_is_begun_again_says_how_it_ended(tmp_path: Path, status: str, said: str) -> None:
    assert broken_off(tmp_path) == "broken off: resumes", "an empty folder"
    (tmp_path / "status.json").write_text(status)
    assert broken_off(tmp_path) == said
