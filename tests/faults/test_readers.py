"""Runs are looked at while they are written: what a reader finds is whole, and it stumbles over nothing."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from core.event_files import event_files
from studies.grid import Study
from studies.plan import settings_of
from studies.report import load, write
from tests.support.forked import started
from tests.support.runs import TRAIN, run, tiny_job
from tools.compare import Run, make_table
from tools.runs import find, look

BUSY = ["trainer.max_steps=60", "trainer.val_check_interval=5", "callbacks.last_checkpoint.every_n_train_steps=1"]
JOB = tuple(tiny_job(*BUSY, "callbacks.run_status.every_seconds=0"))
STUDY = Study("rates", "laptop", "Which?", "little", {"optim.lr": {"1e-3": ["optim.lr=1e-3"]}}, None, (0, 1), JOB)


def test_everything_that_reads_runs_reads_one_that_trains(tmp_path: Path) -> None:
    STUDY.save(tmp_path / "study.yaml")
    planned = STUDY.runs()[0]
    name = planned.name
    command = [str(TRAIN), *settings_of(planned), f"run_dir={name}"]
    statuses, states = [], []
    with started(tmp_path, *command) as training:
        while training.process.is_alive():
            rows = [row for folder in find(tmp_path) if (row := look(folder, time.time()))]
            statuses += [row.status for row in rows if row.step]
            if event_files(tmp_path / name):
                make_table([Run(tmp_path / name)], ["train/loss"])
            _, records, unfinished = load(tmp_path)
            states.append((len(records), list(unfinished)))
            if statuses == ["running"]:
                write(tmp_path)
        assert training.finish().code == 0
    assert statuses[0] == "running"
    assert set(statuses) <= {"running", "done"}
    assert set(map(str, states)) >= {str((0, [])), str((0, [name]))}
    assert f"Half written, and left out: {name}." in (tmp_path / "report.md").read_text()
    _, (record,), unfinished = load(tmp_path)
    assert (record.name, unfinished) == (name, {})


def test_a_summary_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text, seen = Path.write_text, []

    def in_two_parts(path: Path, text: str, *arguments: Any) -> int:
        if "tokens_per_second" in text:
            write_text(path, text[:20])
            seen.append(Run(tmp_path / "run").summary)
        return write_text(path, text, *arguments)

    monkeypatch.setattr(Path, "write_text", in_two_parts)
    run(tmp_path, "run")
    assert seen == [{}]
    assert Run(tmp_path / "run").summary["steps"] == 2


def test_a_run_that_is_gone_by_now_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").touch()
    (folder,) = find(tmp_path)
    shutil.rmtree(folder)
    assert look(folder, time.time()) is None
