"""profiler=... says where a step's time goes."""

import json
from pathlib import Path

import pytest

from tests.support.forked import python
from tests.support.runs import TRAIN, run, tiny_job


@pytest.mark.parametrize("override", ["profiler=simple", "+trainer.profiler=simple"])
def test_the_simple_one_prints_its_table_once(tmp_path: Path, override: str) -> None:
    """Ours, and Lightning's own way to it."""
    finished = python(tmp_path, str(TRAIN), *tiny_job(override, "run_dir=run"))
    assert finished.code == 0, finished.err
    assert (finished.out + finished.err).count("FIT Profiler Report") == 1
    assert "run_training_batch" in finished.out


def test_the_advanced_one_writes_a_file(tmp_path: Path) -> None:
    folder = run(tmp_path, "run", "profiler=advanced") / "profile"
    (file,) = folder.iterdir()
    assert "optimizer_step" in file.read_text()


def test_torchs_one_writes_a_trace_of_operators(tmp_path: Path) -> None:
    folder = run(tmp_path, "run", "profiler=torch", "trainer.max_steps=6", "trainer.val_check_interval=6") / "profile"
    (file,) = folder.iterdir()
    assert file.name.endswith(".pt.trace.json")
    names = {event.get("name") for event in json.loads(file.read_text())["traceEvents"]}
    assert {"aten::mm", "aten::add_"} & names
