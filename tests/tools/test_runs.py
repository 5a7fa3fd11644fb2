"""tools.runs: what it says of runs that ended in every way, of one in progress, and of broken folders."""

import csv
import json
import os
import platform
import shutil
import signal
import time
from pathlib import Path

import lightning as L
import pytest

from core import cli
from tests.support.forked import started
from tests.support.runs import TRAIN, run, tiny_job, train
from tools.run_facts import differences, facts
from tools.runs import WAS_KILLED, Row, age, export, find, look, main

NAN = "+callbacks.break._target_=tests.tools.test_runs.Break"


class Break(L.Callback):
    """Raises, or interrupts as Ctrl-C does, at the end of the first step."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_batch_end(self, *_: object) -> None:
        if self.how == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            raise RuntimeError("[disk] full\nand more")


class Diverge(L.Callback):
    """Makes the loss of the second batch NaN."""

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: object, index: int) -> None:
        if index == 1:
            next(module.parameters()).data.fill_(float("nan"))


def seen(folder: Path) -> Row:
    return look(folder, time.time())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a run for each way to end."""
    cwd = tmp_path_factory.mktemp("runs")
    run(cwd, "runs/study/done")
    stopped = train(cwd, *tiny_job("run_dir=runs/study/stopped", NAN, "+callbacks.break.how=signal"))
    assert stopped.code == 128 + signal.SIGTERM, stopped.err
    with pytest.raises(RuntimeError):
        train(cwd, *tiny_job("run_dir=runs/failed", NAN, "+callbacks.break.how=error"))
    nan = "+callbacks.break._target_=tests.tools.test_runs.Diverge"
    diverged = train(cwd, *tiny_job("run_dir=runs/diverged", nan, "callbacks.divergence.policy=stop"))
    assert diverged.code == 3, diverged.err
    return cwd


def test_every_way_to_end_has_its_status(runs: Path) -> None:
    done, stopped = seen(runs / "runs/study/done"), seen(runs / "runs/study/stopped")
    summary = json.loads((runs / "runs/study/done/summary.json").read_text())
    assert (done.status, done.step, done.max_steps, done.reason) == ("done", 2, 2, "")
    assert done.val_loss == summary["val_loss"]
    assert 0 <= done.seconds < 300
    assert (stopped.status, stopped.step, stopped.reason) == ("stopped", 1, "SIGTERM after step 1")
    failed, diverged = seen(runs / "runs/failed"), seen(runs / "runs/diverged")
    assert (failed.status, failed.step, failed.val_loss, failed.reason) == ("failed", 1, None, "[disk] full")
    assert diverged.status == "diverged"
    assert "non-finite" in diverged.reason


def test_a_resumed_run_is_done_and_keeps_its_last_loss_until_there_is_another(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "runs/study/stopped", tmp_path / "runs/study/stopped")
    resumed = train(tmp_path, *tiny_job("run_dir=runs/study/stopped", "ckpt_path=last", "trainer.max_steps=3"))
    assert resumed.code == 0, resumed.err
    row = seen(tmp_path / "runs/study/stopped")
    assert (row.status, row.step, row.max_steps, row.reason) == ("done", 3, 3, "")
    first = facts(runs / "runs/study/stopped")
    again = [*tiny_job("run_dir=runs/study/stopped", "ckpt_path=last", "trainer.max_steps=9"), NAN]
    train(tmp_path, *again, "+callbacks.break.how=signal")
    assert seen(tmp_path / "runs/study/stopped") == Row(
        row.folder, "stopped", 4, 9, row.val_loss, pytest.approx(0, abs=300), "SIGTERM after step 4"
    )
    differing = differences([first, facts(row.folder)])
    assert differing["trainer.max_steps"] == [2, 9], "the settings are those of the process that trained it last"


def test_a_run_is_running_while_its_process_lives_and_killed_when_it_was_killed(tmp_path: Path) -> None:
    endless = tiny_job("run_dir=run", "trainer.max_steps=1000000", "callbacks.run_status.every_seconds=0")
    with started(tmp_path, str(TRAIN), *endless) as training:
        deadline = time.monotonic() + 280
        while not (tmp_path / "run/status.json").exists() or not seen(tmp_path / "run").step:
            assert training.process.is_alive(), training.finish().err
            assert time.monotonic() < deadline
            time.sleep(0.1)
        row = seen(tmp_path / "run")
        assert (row.status, row.max_steps) == ("running", 1000000)
        assert seen(tmp_path / "run").status == "running", "looking takes no lock away"
    row = seen(tmp_path / "run")
    assert (row.status, row.reason) == ("killed", WAS_KILLED)
    assert row.step


@pytest.mark.parametrize(
    ("host", "seconds", "status", "reason"),
    [
        ("elsewhere", 30, "running", ""),
        ("elsewhere", 90, "killed", f"{WAS_KILLED}; or it trains on elsewhere, whose locks this machine may not see"),
        (platform.node(), 30, "killed", WAS_KILLED),
        (None, 30, "killed", WAS_KILLED),
    ],
)
def test_a_run_of_another_machine_whose_lock_is_not_seen_may_still_run(
    tmp_path: Path, host: str | None, seconds: int, status: str, reason: str
) -> None:
    (tmp_path / "status.json").write_text('{"status": "running", "step": 7, "max_steps": 9}')
    (tmp_path / "provenance.json").write_text(json.dumps({"host": host} if host else {}))
    row = look(tmp_path, time.time() + seconds)
    assert row is not None
    assert (row.status, row.reason) == (status, reason)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ("failed", None)),
        ({"status.json": "{ half"}, ("failed", None)),
        ({"status.json": "[]", "divergence.md": ""}, ("diverged", None)),
        ({"status.json": '{"status": "running", "step": 7, "max_steps": 9}'}, ("killed", 7)),
        ({"status.json": '{"status": "something newer"}'}, ("failed", None)),
        ({"summary.json": '{"steps": 5, "val_loss": null}'}, ("done", 5)),
        ({"summary.json": "{"}, ("failed", None)),
    ],
)
def test_folders_of_older_or_broken_runs_are_listed_too(
    tmp_path: Path, files: dict[str, str], expected: tuple[str, int | None]
) -> None:
    for name, content in {"config.yaml": "", **files}.items():
        (tmp_path / name).write_text(content)
    row = seen(tmp_path)
    assert (row.status, row.step) == expected


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    main(arguments)
    out = capsys.readouterr().out
    assert "\x1b" not in out, "no colour but on a terminal"
    names = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    return [name for name in names if name]


def test_a_run_is_a_row_of_one_line_and_says_below_why_it_ended(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs)
    main([])
    table, reasons = capsys.readouterr().out.split("┘\n")
    assert sum(line.startswith("│") for line in table.splitlines()) == 4
    said = sorted(reasons.splitlines())
    assert said[0].startswith("diverged: ")
    assert "non-finite" in said[0]
    assert said[1:] == ["failed: [disk] full", "study/stopped: SIGTERM after step 1"]


def test_the_table_is_sorted_and_filtered(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/study/empty").mkdir()
    assert {path.name for path in find(Path("runs"))} == {"done", "stopped", "failed", "diverged"}
    status = tmp_path / "runs/study/stopped/status.json"
    status.write_text(json.dumps({**json.loads(status.read_text()), "val_loss": 0.5}))
    for minutes, folder in enumerate(("failed", "study/done", "diverged", "study/stopped")):
        for path in [*(tmp_path / "runs" / folder).iterdir()]:
            os.utime(path, (time.time() - 60 * minutes,) * 2)
    assert listed(capsys) == ["study/stopped", "diverged", "study/done", "failed"]
    assert listed(capsys, "sort=loss")[:2] == ["study/stopped", "study/done"]
    assert listed(capsys, "status=failed,diverged") == ["diverged", "failed"]
    assert listed(capsys, "runs/study/done") == ["runs/study/done"]
    assert listed(capsys, "status=running") == []


@pytest.fixture
def schemes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs that differ in scheme and rate; the last one has left no summary."""
    monkeypatch.chdir(tmp_path)
    for name, placement, rate in (("a", "prenorm", 0.01), ("b", "spannorm", 0.003), ("c", "spannorm", 0.02)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        model = f"{{placement: {placement}, compile: false}}"
        config = f"model: {model}\nmodule: {{model: {model}}}\noptim: {{lr: {rate}}}\nrun_dir: runs/{name}\n"
        (folder / "config.yaml").write_text(config)
        origin = {"commit": f"{name}bcdef{'0' * 34}", "torch": "=2.13", "threads": 1}
        if name != "c":
            (folder / "summary.json").write_text(json.dumps({"steps": 5, "val_loss": 2.0, "provenance": origin}))
    return tmp_path


def test_runs_are_chosen_and_sorted_by_settings_and_origins(schemes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys, "where=[model.placement=spannorm]", "sort=optim.lr") == ["b", "c"]
    assert listed(capsys, "sort=optim.lr") == ["b", "a", "c"]
    assert listed(capsys, "sort=commit") == ["a", "b", "c"], "what has none comes last"
    (schemes / "runs/c/provenance.json").write_text(json.dumps({"host": "here", "command": "python train.py seed=1"}))
    assert listed(capsys, "where=[host=here]", "columns=[command]") == ["c"], "before its summary"
    assert listed(capsys, "where=[commit=bb]") == ["b"], "the beginning of a commit is enough"
    assert listed(capsys, "where=[model.placement=span]") == [], "and of nothing else"
    assert listed(capsys, "where=[model.placement=spannorm,model.compile=false,threads=1]") == ["b"]
    main(["columns=[optim.lr,threads]", "where=[optim.lr=0.02]"])
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if "│ c " in line]
    assert [cell.strip() for cell in row.split("│")][6:8] == ["0.02", "-"]
    main(["columns=[commit]", "where=[commit=ab]"])
    assert "│ abcdef000000 │" in capsys.readouterr().out


def test_all_that_is_known_of_the_runs_can_be_written(schemes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["where=[model.placement=spannorm]", "sort=optim.lr", "output=all.csv"])
    main(["output=all.json", "sort=commit"])
    rows = list(csv.DictReader(Path("all.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == ["runs/b", "runs/c"]
    assert (rows[0]["optim.lr"], rows[0]["val_loss"], rows[1]["val_loss"]) == ("0.003", "2.0", "")
    assert rows[0]["torch"] == "'=2.13", "no formula in a spreadsheet"
    assert not any(name.startswith("module.") for name in rows[0])
    first = json.loads(Path("all.json").read_text())[0]
    assert (first["run"], first["torch"], first["model.compile"]) == ("runs/a", "=2.13", False)


def test_no_setting_is_a_formula_by_its_name(tmp_path: Path) -> None:
    config = {'=HYPERLINK("http://evil", "click")': 1, "@SUM(A1)": 2, "model.dim": 64}
    export([Row(tmp_path / "run", "done", 1, 1, 1.0, 1.0, "", config)], tmp_path / "all.csv")
    names, values = csv.reader((tmp_path / "all.csv").read_text().splitlines())
    assert names[-3:] == ['\'=HYPERLINK("http://evil", "click")', "'@SUM(A1)", "model.dim"]
    assert values[-3:] == ["1", "2", "64"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("columns=[optim.lrr]", "columns='optim.lrr' is not valid: expected a setting in one of their config.yaml"),
        ("columns=[optim.lrr]", "did you mean optim.lr?"),
        ("sort=speed", "sort='speed' is not valid"),
        ("where=[spannorm]", "where='spannorm' is not valid: expected a list of NAME=VALUE"),
        ("where=[model.placment=spannorm]", "where='model.placment' is not valid"),
        ("sort=val_loss", "sort='val_loss' is not valid: expected age, loss, a setting in one of their config.yaml"),
        ("output=all.txt", "output='all.txt' is not valid: expected a name that ends in .csv or .json"),
    ],
)
def test_what_no_run_has_is_said(given: str, message: str, schemes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.run(lambda: main([given]))
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in schemes.iterdir()) == ["runs"]


def test_a_folder_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.run(lambda: main(["nowhere"]))
    assert capsys.readouterr().err == "Error: FOLDER='nowhere' is not valid: expected a folder with runs\n"


def test_ages_read_as_people_say_them() -> None:
    expected = {-1: "0s", 59.9: "59s", 60: "1m", 7199: "1h", 7200: "2h", 90000: "1d", 260000: "3d"}
    assert {seconds: age(seconds) for seconds in expected} == expected
