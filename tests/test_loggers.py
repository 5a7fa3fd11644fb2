"""logger=csv and logger=wandb, alone and beside TensorBoard, under all monitors."""

import csv
import json
import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

from core.event_files import OVERVIEW, event_files
from core.loggers import own_wandb_run
from core.tracking import last_run
from tests.support.forked import python
from tests.support.runs import ROOT, events, run, scalars, tiny_job, train
from tools.curves import read_curves

EVERYTHING = (  # whatever writes text, histograms or a layout, which only TensorBoard takes
    "callbacks.text_sample={_target_: callbacks.console.text_sample.TextSample, prompt: a, num_tokens: 1}",
    "callbacks.gradient_health.histogram_every_n_steps=1",
    "callbacks.signal_propagation.every_n_steps=1",
    "callbacks.representation_collapse.every_n_steps=1",
)


def written(folder: Path) -> dict[str, dict[int, float]]:
    """{tag: {step: value}} of a metrics.csv."""
    values: dict[str, dict[int, float]] = {}
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for tag, value in row.items():
                if value:
                    values.setdefault(tag, {})[step] = float(value)
    return values


def test_two_loggers_say_the_same_of_every_monitor(tmp_path: Path) -> None:
    folder = run(tmp_path, "run", "model=moe", "logger=[tensorboard,csv]", *EVERYTHING)
    columns = written(folder / "csv/version_0")
    tags = {tag for tag in events(folder).Tags()["scalars"] if not tag.startswith(("hp_", f"{OVERVIEW}/"))}
    assert tags - {"epoch"} == columns.keys() - {"epoch"}
    assert len(tags) > 50
    for tag in tags - {"epoch"}:
        assert scalars(folder, tag) == pytest.approx(columns[tag], rel=1e-6, nan_ok=True), tag


def test_tensorboard_calls_a_run_by_its_folder(tmp_path: Path) -> None:
    folder = run(tmp_path, "mine/today")
    shown = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload().Runs()
    assert list(shown) == ["mine/today"]
    assert not list(folder.rglob("hparams.yaml"))


def test_an_older_run_goes_on_where_its_event_files_lie(tmp_path: Path) -> None:
    folder = run(tmp_path, "run")
    (events_of_before,) = event_files(folder)
    (folder / "tensorboard").mkdir()
    events_of_before.rename(folder / "tensorboard" / events_of_before.name)
    run(tmp_path, "run", "trainer.max_steps=3", "ckpt_path=last")
    assert len(list((folder / "tensorboard").iterdir())) == 2
    assert not list(folder.glob("events.out*"))
    assert read_curves(folder)["train/loss"][0] == [0, 1, 2]


def test_csv_alone_is_enough_and_a_resumed_run_leaves_the_first_part_alone(tmp_path: Path) -> None:
    folder = run(tmp_path, "run", "logger=csv", *EVERYTHING)
    assert not event_files(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["tensorboard"], summary["watch"]) == (None, "python -m tools.watch .")
    before = (folder / "csv/version_0/metrics.csv").read_bytes()
    run(tmp_path, "run", "logger=csv", "trainer.max_steps=3", "ckpt_path=last")
    assert (folder / "csv/version_0/metrics.csv").read_bytes() == before
    assert written(folder / "csv/version_0")["train/loss"].keys() == {0, 1}
    assert written(folder / "csv/version_1")["train/loss"].keys() == {2}


def test_without_wandb_the_message_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", Missing())
    finished = train(tmp_path, *tiny_job("run_dir=run", "logger=wandb"))
    assert finished.code == 2
    assert finished.err == "Error: logger.wandb._target_='core.tracking.WeightsAndBiases' is not valid: " + (
        "Try running `pip install wandb`\n"
    )
    assert not (tmp_path / "run").exists()


class Missing:
    """As Lightning's record of a package that is not installed."""

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return "Try running `pip install wandb`"


@pytest.mark.slow  # wandb starts a server of its own
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_offline_beside_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = run(tmp_path, "run", "logger=[tensorboard,wandb]", "logger.wandb.offline=true", *EVERYTHING)
    wandb.teardown()  # waits for its server, which writes the last records after the run has ended
    (record,) = folder.glob("wandb/offline-run-*/*.wandb")
    content = record.read_bytes()
    for tag in ("train/loss", "val/loss", "optim/grad_norm"):
        assert tag.encode() in content
    assert set(scalars(folder, "train/loss")) == {0, 1}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_runs_of_a_sweep_are_runs_of_their_own_at_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    swept = train(tmp_path, "-m", *tiny_job("logger=wandb", "logger.wandb.offline=true", "optim.lr=1e-3,2e-3"))
    assert swept.code == 0, swept.err
    assert len(list(tmp_path.rglob("wandb/offline-run-*"))) == 2
    assert wandb.run is None


@pytest.mark.slow  # wandb starts a server of its own, twice
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_resumed_run_goes_on_in_the_same_one_at_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # its server may be another test's
    monkeypatch.setenv("WANDB_SILENT", "true")
    job = ("logger=wandb", "logger.wandb.offline=true")
    folder = run(tmp_path, "run", *job)
    (made,) = folder.glob("wandb/offline-run-*")
    run(tmp_path, "run", *job, "trainer.max_steps=3", "ckpt_path=last")
    assert {path.name.split("-")[-1] for path in folder.glob("wandb/offline-run-*")} == {made.name.split("-")[-1]}
    wandb.teardown()  # waits for its server
    (record,) = made.glob("*.wandb")
    for text in (f"{tmp_path.name}/run", "asked/trainer/max_steps", "provenance/torch", str(folder)):
        assert text.encode() in record.read_bytes(), text


def test_the_last_run_at_wandb_is_known_by_its_folder(tmp_path: Path) -> None:
    assert last_run(tmp_path) is None
    for name in (
        "run-20260102_000000-b1",
        "offline-run-20260101_000000-c2",
        "run-20260101_120000-a_3",
        "run-x",
        "latest-run",
    ):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    assert last_run(tmp_path) == "b1"


def test_a_run_at_wandb_ends_with_the_context_unless_it_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    service, theirs, ours, failed = SimpleNamespace(run=None), Mock(), Mock(), Mock()
    monkeypatch.setitem(sys.modules, "wandb", service)
    service.run = theirs
    with own_wandb_run():
        pass
    theirs.finish.assert_not_called()
    service.run = None
    with own_wandb_run():
        service.run = ours
    ours.finish.assert_called_once_with(exit_code=0)

    def fail() -> None:
        service.run = failed
        sys.exit(3)

    with pytest.raises(SystemExit), own_wandb_run():
        fail()
    failed.finish.assert_called_once_with(exit_code=1)


def test_wandb_without_a_login_is_a_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it keeps the environment in which it was first used in the process
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # whose .netrc may have a key
    finished = train(tmp_path, *tiny_job("run_dir=run", "logger=wandb"))
    assert (finished.code, finished.err.count("Error")) == (2, 1), finished.err
    assert "\nError: logger=wandb cannot be had (No API key configured." in f"\n{finished.err}"
    assert "WARNING" not in finished.err
    assert finished.err.endswith("`wandb login` once, or logger.wandb.offline=true keeps everything here\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # MLflow makes a database
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # SQLAlchemy of MLflow
def test_mlflow_keeps_the_same_curves_in_the_runs_folder(tmp_path: Path) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    folder = run(tmp_path, "run", "logger=[tensorboard,mlflow]", *EVERYTHING)
    resumed = ["logger=[tensorboard,mlflow]", "trainer.max_steps=3", "ckpt_path=last"]
    out = train(tmp_path, *tiny_job("run_dir=run", *resumed, *EVERYTHING)).out
    assert "Curves in MLflow: mlflow ui --backend-store-uri sqlite:///run/mlflow.db\n" in out
    client = tracking.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'spannorm-suite'")
    second, first = client.search_runs([experiment.experiment_id])  # the newest first
    for tag in ("train/loss", "gradients/block_1/all", "signal/block_2/variance"):
        kept = {m.step: m.value for part in (first, second) for m in client.get_metric_history(part.info.run_id, tag)}
        assert kept == pytest.approx(scalars(folder, tag), rel=1e-6), tag
    assert first.data.params["model/placement"] == "spannorm"
    assert [part.info.run_name for part in (first, second)] == [f"{tmp_path.name}/run"] * 2
    assert first.data.params["run_dir"] == str(folder)
    assert [part.data.params["asked/trainer/max_steps"] for part in (first, second)] == ["2", "3"]
    assert first.data.params["provenance/torch"] == torch.__version__
    assert "epoch" not in first.data.metrics


@pytest.mark.slow  # Comet waits for its threads
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_comet_offline_keeps_each_run_of_a_sweep_by_itself_and_sends_nothing(tmp_path: Path) -> None:
    pytest.importorskip("comet_ml")
    job = tiny_job("logger=[tensorboard,comet]", "logger.comet.offline=true", *EVERYTHING)
    ended = python(tmp_path, "-m", "train", "-m", *job, "hydra.sweep.dir=runs", "seed=0,1", PYTHONPATH=str(ROOT))
    assert ended.code == 0, ended.err
    assert "sentry" not in ended.out + ended.err
    folders = sorted(path.parent for path in tmp_path.rglob("comet"))
    assert len(folders) == 2
    for folder in folders:
        (packed,) = (folder / "comet").glob("*.zip")
        with zipfile.ZipFile(packed) as file:
            messages = [json.loads(line)["payload"] for line in file.read("messages.json").decode().splitlines()]
        for tag in ("train/loss", "gradients/block_1/all"):
            found = [m["metric"] for m in messages if m.get("metric", {}).get("metricName") == tag]
            kept = {metric["step"]: float(metric["metricValue"]) for metric in found}
            assert kept == pytest.approx(scalars(folder, tag), rel=1e-6), tag
        text = json.dumps(messages)
        assert "/".join(folder.parts[-2:]) in text, "its name"
        assert "epoch" not in {m["metric"]["metricName"] for m in messages if "metric" in m}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_comet_without_a_key_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("comet_ml")
    environment = {"PYTHONPATH": str(ROOT), "COMET_API_KEY": "", "HOME": str(tmp_path / "home")}
    ended = python(tmp_path, "-m", "train", *tiny_job("run_dir=run", "logger=comet"), **environment)
    assert ended.code == 2, ended.err
    assert "\nError: logger=comet cannot be had (Comet.ml requires an API key" in f"\n{ended.err}"
    assert ended.err.endswith("COMET_API_KEY has yours, or logger.comet.offline=true keeps everything here\n")
    assert not (tmp_path / "run").exists()
