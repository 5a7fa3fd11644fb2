"""A run folder from anywhere is looked at when it is taken: nothing trains in one that could not be left well."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from core.event_files import event_files
from core.run_folder import WRITTEN, read_overrides, resume_command
from core.status import LOCK
from tests.support.fuzz.sandbox import tree
from tests.support.runs import ROOT, tiny_job, train

JOB = ["trainer.max_steps=2", "callbacks.last_checkpoint.every_n_train_steps=1"]
GOING_ON = [*tiny_job(*JOB), "run_dir=run", "trainer.max_steps=4"]


def assert_refused(cwd: Path, part: str, *arguments: str) -> None:
    before = tree(cwd.parent)
    refused = train(cwd, *GOING_ON, *(arguments or ("ckpt_path=last",)))
    assert refused.code == 2, refused.out
    assert part in refused.err
    assert refused.err.count("\n") == 1
    assert tree(cwd.parent) == before


@pytest.mark.parametrize("content", ["[", "a: 1\n", "- 1\n", "\0"])
def test_damaged_overrides_are_found_before_anything_is_trained(cwd: Path, content: str) -> None:
    (cwd / "run/overrides.yaml").write_text(content, errors="surrogateescape")
    assert_refused(cwd, "Error: run/overrides.yaml ")


def test_overrides_that_are_gone_are_those_of_the_run_that_goes_on(cwd: Path) -> None:
    (cwd / "run/overrides.yaml").unlink()
    resumed = train(cwd, *GOING_ON, "ckpt_path=last")
    assert resumed.code == 0, resumed.err
    assert read_overrides(cwd / "run") == [*GOING_ON, "ckpt_path=last"]
    assert "trainer.max_steps=4" in resume_command(cwd / "run")


def away(name: str) -> Callable[[Path, Path], None]:
    """Move a part of the run out of it, and leave a link there."""

    def move(run: Path, outside: Path) -> None:
        if not (run / name).exists():
            (run / name).write_text("")
        (run / name).rename(outside / "theirs")
        (run / name).symlink_to(outside / "theirs")

    return move


def snapshots(run: Path, outside: Path) -> None:
    """`step_1` is one of those that are removed when its checkpoint is gone."""
    (outside / "step_1").mkdir()
    (outside / "step_1/thesis.txt").write_text("mine")
    shutil.copytree(run / "checkpoints", outside, dirs_exist_ok=True)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to(os.path.relpath(outside, run))


WRITERS = {
    "callbacks/anatomy": ("anatomy",),
    "callbacks/checkpointing": ("checkpoints", "checkpoints/last.ckpt"),
    "callbacks/console": ("status.json", "status.json.new", "summary.json"),
    "callbacks/divergence": ("events.jsonl", "divergence.md", "flight_recorder"),
    "logger/comet": ("comet",),
    "logger/csv": ("csv",),
    "logger/mlflow": ("mlflow.db", "mlflow.db-journal"),
    "logger/tensorboard": ("tensorboard", "events.out.tfevents.1"),
    "logger/wandb": ("wandb",),
    "profiler/advanced": ("profile",),
    "profiler/torch": ("profile",),
}
"""The configurations that are given the run's folder, and what is written there on behalf of each."""
GROUPS = ("callbacks", "logger", "profiler")
LINKS = {
    **{name: away(name) for names in WRITERS.values() for name in names},
    "checkpoints": snapshots,
    "deep": lambda run, outside: (run / "checkpoints/step_3").symlink_to(outside),
}


@pytest.mark.parametrize("kind", LINKS)
def test_no_link_leads_a_run_out_of_its_folder(cwd: Path, kind: str) -> None:
    (cwd / "outside").mkdir()
    LINKS[kind](cwd / "run", cwd / "outside")
    assert_refused(cwd, "leads out of it by a link, through which the run would write and delete; remove the link")


def test_all_that_write_into_a_run_are_known_above() -> None:
    """Another one belongs into WRITERS, and what it writes into core.run_folder.WRITTEN."""
    files = [path for group in GROUPS for path in (ROOT / "configs" / group).glob("*.yaml")]
    given = {f"{path.parent.name}/{path.stem}" for path in files if "${run_dir}" in path.read_text()}
    assert given == WRITERS.keys()


ALL_CALLBACKS = "callbacks=[{}]".format(",".join(sorted(path.stem for path in (ROOT / "configs/callbacks").glob("*"))))


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([ALL_CALLBACKS, "logger=[tensorboard,csv]", "profiler=advanced"], {"anatomy", "csv", "profile"}),
        pytest.param(["logger=mlflow"], {"mlflow.db"}, marks=pytest.mark.slow),
        pytest.param(["logger=wandb", "logger.wandb.offline=true"], {"wandb"}, marks=pytest.mark.slow),
        pytest.param(["logger=comet", "logger.comet.offline=true"], {"comet"}, marks=pytest.mark.slow),
        pytest.param(["profiler=torch", "trainer.max_steps=6"], {"profile"}, marks=pytest.mark.slow),
    ],
    ids=["quick", "mlflow", "wandb", "comet", "torch"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_writes_nothing_else_into_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], names: set[str]
) -> None:
    for logger, package in {"mlflow": "mlflow", "wandb": "wandb", "comet": "comet_ml"}.items():
        if f"logger={logger}" in overrides:
            pytest.importorskip(package)
    monkeypatch.setenv("WANDB_SILENT", "true")
    finished = train(tmp_path, *tiny_job("run_dir=run"), *overrides)
    assert finished.code == 0, finished.err
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert written >= names
    assert {name for name in written if not re.fullmatch(rf"{WRITTEN}|{LOCK}", name)} == set()


def test_links_that_wandb_made_for_an_older_run_are_no_way_out(cwd: Path) -> None:
    """It logs its own doings elsewhere, beside the folder of a run that it never writes into again."""
    (cwd / "outside").mkdir()
    older = cwd / "run/wandb/offline-run-20260101_000000-abc"
    older.mkdir(parents=True)
    (older / "debug-core.log").symlink_to(cwd / "outside/debug.log")
    finished = train(cwd, *tiny_job("run_dir=run", "ckpt_path=last", "trainer.max_steps=3"))
    assert finished.code == 0, finished.err
    (cwd / "run/wandb/debug.log").symlink_to(cwd / "outside/debug.log")
    assert_refused(cwd, "run/wandb/debug.log leads out of it by a link")


def test_no_link_leads_a_new_run_out_of_the_folder_that_it_is_given(cwd: Path) -> None:
    """A folder without a run in it: nothing but a link to a place where somebody's checkpoints lie."""
    (cwd / "outside/step_1").mkdir(parents=True)
    shutil.rmtree(cwd / "run")
    (cwd / "run").mkdir()
    (cwd / "run/checkpoints").symlink_to(cwd / "outside")
    assert_refused(cwd, "run/checkpoints leads out of it by a link", "ckpt_path=null")


def test_links_within_a_run_and_to_it_are_followed(cwd: Path) -> None:
    (cwd / "run").rename(cwd / "elsewhere")
    (cwd / "run").symlink_to("elsewhere")
    (events,) = event_files(cwd / "run")
    events.rename(cwd / "run/curves")
    events.symlink_to("curves")
    (cwd / "run/notes").symlink_to(cwd.parent)
    resumed = train(cwd, *GOING_ON, "ckpt_path=last")
    assert resumed.code == 0, resumed.err


def test_a_pipe_in_the_place_of_the_events_is_not_waited_for(cwd: Path) -> None:
    os.mkfifo(cwd / "run/events.jsonl")
    assert_refused(cwd, "run/events.jsonl is no regular file; remove it")
