"""A study run as a user runs it: broken runs are marked, done ones left alone, killed ones resumed."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import studies.run
from core.errors import UserError
from core.status import read as read_status
from studies.grid import Study
from studies.plan import known_runs, lock_of, planned
from studies.record import Record
from tests.support.forked import python
from tests.support.running import command_line, is_held, parent_of, with_text
from tests.support.runs import ROOT, events, scalars, tiny_job
from tests.support.waiting import wait_for

RECORDS, RUNS = Path("results/studies/mine/laptop"), Path("runs/studies/mine/laptop")


def write_study(folder: Path, axes: dict[str, Any], seeds: list[int], *overrides: str) -> None:
    (folder / "study").mkdir()
    scale = {"needs": "little", "overrides": [*tiny_job("callbacks.progress=null"), *overrides]}
    content = {"question": "Which?", "axes": axes, "seeds": seeds, "baseline": None, "scales": {"laptop": scale}}
    (folder / "study/mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def command(folder: Path, module: str, *arguments: str) -> list[str]:
    search = f"hydra.searchpath=[file://{folder}]"
    return [sys.executable, "-m", f"studies.{module}", "study=mine", search, *arguments]


SETTINGS = {"PYTHONPATH": str(ROOT), "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
ENVIRONMENT = {**os.environ, **SETTINGS}


def call(folder: Path, module: str, *arguments: str) -> str:
    """What it printed."""
    ended = python(folder, *command(folder, module, *arguments)[1:], **SETTINGS)
    assert ended.code == 0, ended.err
    return ended.out


class Crash(L.Callback):
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        raise RuntimeError("out of luck")


def test_a_study_from_beginning_to_report(tmp_path: Path) -> None:
    jobs = {"crash": [f"+callbacks.crash._target_={__name__}.Crash"], "32": ["data.seq_len=32"]}
    write_study(tmp_path, {"model.placement": ["spannorm"], "job": jobs}, [0, 1])
    out = call(tmp_path, "run", "seeds=[0]", "hydra/launcher=basic")
    assert "mine, laptop: 0 of 2 runs are done" in out

    broken, good = (Record.load(tmp_path / RECORDS / f"spannorm_{job}_seed0.json") for job in jobs)
    assert broken.status == "broken"
    assert broken.reason == "RuntimeError: out of luck"
    assert good.status == "collapsed", "two steps teach nothing"
    assert good.first_loss == pytest.approx(good.train_loss[1][0], rel=1e-4)
    norms = list(scalars(tmp_path / RUNS / good.name, "optim/grad_norm").values())
    assert good.grad_norm_p999 == pytest.approx(max(norms), rel=0.01)
    assert good.clipped == sum(norm > 1.0 for norm in norms) / len(norms)
    largest = [scalars(tmp_path / RUNS / good.name, f"signal/block_{block}/max") for block in (1, 2)]
    assert good.largest_activation == pytest.approx(
        max(value for curve in largest for value in curve.values()), rel=1e-4
    )
    validation = scalars(tmp_path / RUNS / good.name, "val/loss")
    assert good.val_loss == pytest.approx(list(validation.values())[-1], rel=1e-4)
    assert good.train_loss[1] == pytest.approx(
        list(scalars(tmp_path / RUNS / good.name, "train/loss").values()), rel=1e-4
    )
    assert set(good.by_block["gradients/block_{}/all"]) == {"0", "1"}
    assert good.provenance["threads"] == 1
    assert broken.decay is None
    assert good.decay is not None
    assert good.decay.measured[-1] == 1.0
    assert good.decay.predicted is not None
    assert len(good.decay.measured) == len(good.decay.predicted) == 2

    assert len(Study.load(tmp_path / RECORDS / "study.yaml").runs()) == 4, (
        "the whole study, also where a part was asked"
    )

    status = call(tmp_path, "status")
    assert re.search(r"spannorm_crash_seed0 +. broken", status)
    assert re.search(r"spannorm_32_seed1 +. to do", status)
    assert "2 of 4 runs have ended" in status
    check_outcomes(tmp_path, broken, replace(good, status="finished"))

    content = events(tmp_path / RUNS / good.name).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["model/placement"].string_value == "spannorm"


@pytest.mark.parametrize(
    ("axis", "values", "overrides", "said"),
    [
        (
            "model.norm",
            ["rmsnorm", "nosuch"],
            [],
            "study, model.norm nosuch: model.norm='nosuch' is not valid: expected",
        ),
        (
            "model.nrm",
            ["rmsnorm"],
            [],
            "study, model.nrm rmsnorm: model.nrm='rmsnorm' is not valid: no such field; one of",
        ),
        (
            "optim.lr",
            [1e-3],
            ["trainer.max_step=2"],
            "trainer.max_step='2' is not valid: no such field; one of accelerator",
        ),
        ("data.seqlen", [32], [], "study, data.seqlen 32: data.seqlen='32' is not valid: no such field; one of"),
    ],
)
def test_a_slip_is_said_before_anything_trains(
    axis: str, values: list[str], overrides: list[str], said: str, tmp_path: Path
) -> None:
    write_study(tmp_path, {axis: values}, [0], *overrides)
    ended = python(tmp_path, *command(tmp_path, "run", "hydra/launcher=basic")[1:], **SETTINGS)
    assert ended.code == 2, ended.err
    assert said in ended.err
    assert ended.err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"study"}


def test_what_follows_waits_for_runs_without_a_result_and_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two rates is refused, as of a full disk; the rate is not selected from the other one alone."""
    write_study(tmp_path, {"model.placement": ["spannorm"], "optim.lr": ["1e-3", "2e-3"]}, [1])
    path = tmp_path / "study/mine.yaml"
    path.write_text(path.read_text() + "select_seeds: [0]\n")
    monkeypatch.chdir(tmp_path)
    trained: list[str] = []

    def run_one() -> None:
        plan = planned(arguments)
        for run in known_runs(plan):
            if run.name in sys.argv[-1].removeprefix("run=").split(","):
                trained.append(run.name)
                point = dict(run.point)
                record = Record(run.name, point, run.seed, list(run.overrides), "finished", "", val_loss=1.0)
                if trained != ["spannorm_0.001_seed0"]:  # the first one finds the disk full
                    record.save(plan.record_of(run))

    arguments = ["study=mine", f"hydra.searchpath=[file://{tmp_path}]", "hydra/launcher=basic"]
    monkeypatch.setattr(studies.run, "run_one", run_one)
    monkeypatch.setattr(sys, "argv", ["run"])
    with pytest.raises(UserError, match=r"^1 run has no result: spannorm_0\.001_seed0; why is said above"):
        studies.run.main(arguments)
    assert trained == ["spannorm_0.001_seed0", "spannorm_0.002_seed0"]
    studies.run.main(arguments)
    assert trained[2:] == ["spannorm_0.001_seed0", "spannorm_0.001_seed1"], "the first of equals"


def check_outcomes(folder: Path, broken: Record, good: Record) -> None:
    """Of a run that is recorded now, and of one that has its record and is measured later; what is done is left alone.

    Two steps are no result, of which nothing is measured: the runs are made out to be of a corpus without counts.
    """

    def path(record: Record) -> Path:
        return folder / RECORDS / f"{record.name}.json"

    shutil.copytree(folder / RUNS / good.name, folder / RUNS / "spannorm_32_seed1")
    others = [replace(one, name=one.name.replace("seed0", "seed1"), seed=1) for one in (broken, good)]
    for record in others:
        record.save(path(record))
    summary = folder / RUNS / good.name / "summary.json"
    counted = json.loads(summary.read_text())
    summary.write_text(json.dumps({**counted, "bigram_loss": None, "unigram_loss": None}))
    path(good).unlink()

    written_at = {path(one): path(one).stat().st_mtime_ns for one in (broken, others[0])}
    out = call(folder, "run", "hydra/launcher=basic", "outcomes=[loss,expert_drop]")
    assert "3 of 4 runs are done" in out
    assert "spannorm_32_seed0: finished" in out
    assert "spannorm_32_seed1: measured" in out
    assert {path: path.stat().st_mtime_ns for path in written_at} == written_at
    for record in (good, others[1]):
        measured = Record.load(path(record))
        assert measured.outcomes["loss"] == pytest.approx(record.val_loss, abs=0.2), "of more text than in training"
        assert measured.outcomes["expert_drop"] is None
        assert measured.train_loss == record.train_loss


@pytest.mark.slow
def test_the_best_rate_of_some_seeds_is_run_with_others(tmp_path: Path) -> None:
    long = ("trainer.max_steps=400", "trainer.val_check_interval=400")  # or all of them collapse
    write_study(tmp_path, {"model.placement": ["spannorm"], "optim.lr": ["1e-9", "3e-3"]}, [1, 2], *long)
    path = tmp_path / "study/mine.yaml"
    path.write_text(path.read_text() + "select_seeds: [0]\n")
    out = call(tmp_path, "run", "hydra/launcher=basic")
    assert "0 of 2 runs are done" in out
    assert "2 of 4 runs are done" in out
    assert set(table(tmp_path)) == {
        f"spannorm_{name}" for name in ("1e-09_seed0", "0.003_seed0", "0.003_seed1", "0.003_seed2")
    }
    assert "4 of 4 runs have ended" in call(tmp_path, "status")
    assert "4 of 4 runs are done" in call(tmp_path, "run", "hydra/launcher=basic")


def table(folder: Path) -> dict[str, tuple[str, float | None, list[float]]]:
    records = [Record.load(path) for path in sorted((folder / RECORDS).glob("*.json"))]
    return {record.name: (record.status, record.val_loss, record.train_loss[1]) for record in records}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_times_it_ends_in_the_same_table(tmp_path: Path) -> None:
    """kill -9 of the study alone, and of everything; what goes on by itself is waited for, what is dead resumes."""
    long = (
        "trainer.max_steps=400",
        "trainer.val_check_interval=400",
        "callbacks.last_checkpoint.every_n_train_steps=20",
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        write_study(folder, {"model.placement": ["prenorm", "spannorm"]}, [0], *long)
    call(whole, "run", "hydra.launcher.n_jobs=2")
    draw, kills = random.Random(0), 0
    for attempt in range(12):
        given = command(killed, "run", "hydra.launcher.n_jobs=2")
        study = subprocess.Popen(
            given,
            cwd=killed,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            study.wait(timeout=draw.uniform(5, 25))
            break
        except subprocess.TimeoutExpired:
            kills += 1
            if attempt % 2:
                os.killpg(study.pid, signal.SIGKILL)
            else:
                study.kill()
            study.wait()
            time.sleep(draw.uniform(0, 2))
    assert kills >= 2
    call(killed, "run", "hydra.launcher.n_jobs=2")
    assert table(killed) == table(whole)
    assert len(table(whole)) == 2


@pytest.mark.slow
def test_a_run_outlives_its_study_and_holds_its_folder(tmp_path: Path) -> None:
    write_study(tmp_path, {"model.placement": ["spannorm"]}, [0], "trainer.max_steps=100000")
    folder = tmp_path / RUNS / "spannorm_seed0"
    given = command(tmp_path, "run", "hydra/launcher=basic")
    with (tmp_path / "said").open("w") as said:
        study = subprocess.Popen(given, cwd=tmp_path, env=ENVIRONMENT, stdout=said, stderr=said, start_new_session=True)
    try:
        wait_for(lambda: read_status(folder).get("status") == "running")
        (run,) = with_text("runs/studies/mine/laptop/spannorm_seed0")
        forking = parent_of(run)
        assert "studies/warm.py" in command_line(forking)
        study.kill()
        study.wait()
        assert is_held(lock_of(folder))
        assert parent_of(run) == forking
        os.kill(run, signal.SIGKILL)
        wait_for(lambda: not is_held(lock_of(folder)))
        wait_for(lambda: not Path(f"/proc/{forking}").exists())
    finally:
        with suppress(ProcessLookupError):
            os.killpg(study.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_run_that_was_killed_does_not_stop_the_others(tmp_path: Path) -> None:
    long = ("trainer.max_steps=300", "callbacks.last_checkpoint.every_n_train_steps=20")
    write_study(tmp_path, {"model.placement": ["prenorm", "spannorm"]}, [0], *long)
    study = subprocess.Popen(
        command(tmp_path, "run", "hydra/launcher=basic"),
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    first = tmp_path / RUNS / "prenorm_seed0/checkpoints/last.ckpt"
    while not first.exists():
        time.sleep(0.1)
    subprocess.run(["pkill", "-9", "-f", "train.py.*prenorm_seed0"], check=True)
    out, _ = study.communicate(timeout=120)
    assert "prenorm_seed0: killed; start the study again and it resumes" in out
    assert set(table(tmp_path)) == {"spannorm_seed0"}
    assert json.loads((tmp_path / RECORDS / "spannorm_seed0.json").read_text())["train_loss"][0][-1] == 299
    call(tmp_path, "run", "hydra/launcher=basic")
    assert set(table(tmp_path)) == {"prenorm_seed0", "spannorm_seed0"}
