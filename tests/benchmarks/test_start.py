"""The benchmark of waiting: it finds the first line and no other, and judges what it measures by the median."""

from pathlib import Path

import pytest

from benchmarks import start


def test_it_waits_for_the_line_and_for_no_more(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import time\nprint('\\nbusy')\ntime.sleep(0.2)\nprint('step 1/2')\ntime.sleep(60)\n")
    seconds, processor = start.first_line(start.Wait((str(script),), 1.0, "step 1/"))
    assert 0.2 < seconds < 50
    assert 0 < processor < seconds
    assert start.first_line(start.Wait((str(script),), 1.0))[0] < 50, "any line that is not empty"
    script.write_text("print('busy')\n")
    with pytest.raises(RuntimeError, match="ended without a line 'step 1/'"):
        start.first_line(start.Wait((str(script),), 1.0, "step 1/"))


@pytest.mark.slow
def test_it_runs_and_writes_its_table(tmp_path: Path) -> None:
    start.main(["rounds=1", "runs=2", f"output={tmp_path}/start.md"])
    text = (tmp_path / "start.md").read_text()
    for command in ("train.py --help", "-m tools.plan", "-m tools.export run output=new0/export", "-m studies.status"):
        assert f"| `python {command}" in text
    assert "A study of 2 runs of two steps took " in text
    assert text.count("**met**") + text.count("**missed**") == text.count("| `python ") - 2 == 13


def test_goals_are_judged_by_the_median() -> None:
    rows = [start.Row("a", [1.0, 9.0, 2.0], 1.0, 3.0), start.Row("b", [4.0, 1.0, 5.0], 1.0, 3.0)]
    rows += [start.Row("a part", [9.0], 1.0, None)]
    assert start.verdict(rows) == "Goals: 1 of 2 met."
    assert "2.00 (1.00 to 9.00)" in str(rows[0])
    assert "**missed**" in str(rows[1])


def test_each_command_writes_where_no_other_does(tmp_path: Path) -> None:
    commands = [" ".join(wait.command) for wait in start.waits(tmp_path, tmp_path / "new")]
    assert len(set(commands)) == len(commands)
    assert sum(f"{tmp_path}/new/" in command for command in commands) == 3
