"""Runs that ended, and what comes after them: the next one, a longer one, or a clear refusal."""

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from tests.support.runs import assert_began, load, run, scalars, tiny_job, train

FIRST = "runs/dense_prenorm/first"
BEST = f"{FIRST}/checkpoints/best.ckpt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with one finished run of 2 steps."""
    cwd = tmp_path_factory.mktemp("finished")
    run(cwd, FIRST, "experiment=dense_prenorm")
    return cwd


def test_the_printed_command_makes_a_finished_run_as_long_again(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    resume = json.loads((tmp_path / FIRST / "summary.json").read_text())["resume"]
    assert train(tmp_path, *shlex.split(resume)[2:]).code == 0
    summary = json.loads((tmp_path / FIRST / "summary.json").read_text())
    assert (summary["steps"], summary["tokens"]) == (4, 4 * 4 * 32)
    assert_began(tmp_path / FIRST, 2)


def test_last_is_the_newest_run_of_the_experiment(finished: Path, tmp_path: Path) -> None:
    for experiment, name, age in [("dense_prenorm", "a", 0), ("dense_prenorm", "b", 9), ("dense_spannorm", "c", -9)]:
        folder = tmp_path / "runs" / experiment / name
        shutil.copytree(finished / FIRST, folder)
        os.utime(folder, (1e9 - age, 1e9 - age))
    (tmp_path / "runs/dense_prenorm/without_checkpoint").mkdir()
    resumed = train(tmp_path, *tiny_job("experiment=dense_prenorm", "ckpt_path=last", "trainer.max_steps=3"))
    assert resumed.code == 0, resumed.err
    assert resumed.out.startswith("Run folder: runs/dense_prenorm/a\n")
    assert load(tmp_path / "runs/dense_prenorm/a/checkpoints/last.ckpt")["global_step"] == 3
    assert_began(tmp_path / "runs/dense_prenorm/a", 2)


def test_a_checkpoint_of_a_run_goes_on_in_its_folder(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    resumed = train(tmp_path, *tiny_job("model.placement=prenorm", f"ckpt_path={BEST}", "trainer.max_steps=3"))
    assert resumed.code == 0, resumed.err
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["dense_prenorm"]
    assert json.loads((tmp_path / FIRST / "summary.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"run_dir={FIRST}"], f"run_dir='{FIRST}' is not valid: expected a folder without a run in it"),
        ([f"run_dir={FIRST}", "ckpt_path=last"], "trainer.max_steps=2 is not valid: expected more than 2"),
        (
            [f"ckpt_path={BEST}", "model.num_heads=1"],
            "model.num_heads=1 is not valid: expected 2, as in the checkpoint",
        ),
        ([f"ckpt_path={BEST}", "model.ffn=moe"], "model.ffn='moe' is not valid: expected 'dense', as in"),
        ([f"ckpt_path={BEST}", "optim.lr=1e-9"], "optim.lr=1e-09 is not valid: expected 0.003, as in the checkpoint"),
        ([f"ckpt_path={BEST}", "optim.weight_decay=0"], "optim.weight_decay=0.0 is not valid: expected 0.1, as in"),
        ([f"ckpt_path={BEST}", "data.seq_len=16"], "data.seq_len=16 is not valid: expected 32, as in the checkpoint"),
        ([f"ckpt_path={BEST}", "seed=7"], "data.seed=7 is not valid: expected 0, as in the checkpoint"),
        (["ckpt_path=garbage"], "ckpt_path='garbage' is not valid: expected a whole checkpoint of this project"),
        (["ckpt_path=truncated"], "ckpt_path='truncated' is not valid: expected a whole checkpoint"),
        (["ckpt_path=foreign"], "ckpt_path='foreign' is not valid: expected a whole checkpoint"),
        (["run_dir=elsewhere", "ckpt_path=last"], "expected a run with a checkpoints/last.ckpt in elsewhere"),
    ],
)
def test_what_cannot_go_on_is_refused(finished: Path, arguments: list[str], message: str) -> None:
    (finished / "garbage").write_text("no checkpoint")
    (finished / "truncated").write_bytes((finished / BEST).read_bytes()[:-1000])
    torch.save({"state_dict": {}}, finished / "foreign")
    before = contents(finished)
    refused = train(finished, *tiny_job("experiment=dense_prenorm"), *arguments)
    assert refused.code == 2
    assert refused.err.startswith("Error: ")
    assert message in refused.err
    assert contents(finished) == before


def test_what_follows_from_the_step_may_change_in_a_resumed_run(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    changed = ["data.batch_size=2", "optim.schedule=constant", "optim.warmup_steps=0", "trainer.max_steps=4"]
    assert train(tmp_path, *tiny_job("experiment=dense_prenorm", f"ckpt_path={BEST}", *changed)).code == 0
    assert scalars(tmp_path / FIRST, "optim/lr")[3] == pytest.approx(3e-3)
    content = load(tmp_path / FIRST / "checkpoints/last.ckpt")["PythonStdlib"]
    assert content["samples"] == 2 * 4 + 2 * 2


class Fail(L.Callback):
    """The last hook of a run fails."""

    def on_fit_end(self, *_: Any) -> None:
        raise OSError("a logger's server is gone")


def test_what_fails_at_the_end_does_not_cost_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="server is gone"):
        train(tmp_path, *tiny_job("run_dir=run", "+callbacks.fail._target_=tests.test_run_folders.Fail"))
    assert load(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 2


def test_a_metric_that_nobody_logs_is_said_in_one_line(tmp_path: Path) -> None:
    finished = train(tmp_path, *tiny_job("run_dir=run", "callbacks.best_checkpoint.monitor=val/lss"))
    assert finished.code == 2
    assert finished.err.startswith("Error: ")
    assert "monitor='val/lss'" in finished.err
    assert "val/loss" in finished.err
    assert finished.err.count("\n") == 1


@pytest.mark.slow
def test_the_main_job_beats_the_bigram_baseline(tmp_path: Path) -> None:
    finished = train(tmp_path, "experiment=moe_spannorm", "run_dir=run")
    assert finished.code == 0, finished.err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["val_loss"] < 0.7 * summary["bigram_loss"]
    assert f"{summary['bigram_loss']:.4f}" in finished.out


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_resumed_run_remembers_the_best_of_its_first_part(tmp_path: Path) -> None:
    """With falling losses the highest is the first: it stays the best one only if it is remembered."""
    highest = ["trainer.val_check_interval=1", "callbacks.best_checkpoint.mode=max"]
    run(tmp_path, "run", *highest)
    folder = run(tmp_path, "run", *highest, "trainer.max_steps=4", "ckpt_path=last")
    assert_began(folder, 2)
    losses = scalars(folder, "val/loss")
    assert losses[0] == max(losses.values())
    assert load(folder / "checkpoints/best.ckpt")["global_step"] == 1


def test_checkpoints_hold_weights_and_plain_values_only(finished: Path) -> None:
    for name in ("best", "last"):
        content = torch.load(finished / FIRST / f"checkpoints/{name}.ckpt", weights_only=True)
        assert content["hyper_parameters"]["model"]["dim"] == 32
        assert content["datamodule_hyper_parameters"]["seq_len"] == 32


def test_two_runs_of_one_second_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda form: "now")
    for _ in range(2):
        assert train(tmp_path, *tiny_job("trainer.max_steps=1")).code == 0
    first, second = sorted(path.name for path in (tmp_path / "runs/default").iterdir())
    assert first.startswith("now_")
    assert second == f"{first}-2"
    resumed = train(tmp_path, *tiny_job("ckpt_path=last", "trainer.max_steps=2"))
    assert resumed.out.startswith(f"Run folder: runs/default/{second}\n"), resumed.err


def test_an_override_that_refers_to_another_field_is_resumed_as_it_was_given(tmp_path: Path) -> None:
    assert train(tmp_path, *tiny_job("data.seed=${seed}", "seed=3", "run_dir=run")).code == 0
    resume = json.loads((tmp_path / "run/summary.json").read_text())["resume"]
    assert "data.seed=${seed}" in shlex.split(resume)
    assert train(tmp_path, *shlex.split(resume)[2:]).code == 0


def test_looking_at_an_older_run_does_not_make_it_the_newest(tmp_path: Path) -> None:
    """As tools.evaluate does, which adds a folder to it."""
    for name in ("older", "newer"):
        assert train(tmp_path, *tiny_job("experiment=dense_prenorm"), f"run_dir=runs/dense_prenorm/{name}").code == 0
    (tmp_path / "runs/dense_prenorm/older/evaluation").mkdir()
    resumed = train(tmp_path, *tiny_job("experiment=dense_prenorm", "ckpt_path=last", "trainer.max_steps=3"))
    assert resumed.out.startswith("Run folder: runs/dense_prenorm/newer\n")


def test_a_run_with_the_best_checkpoint_alone_does_not_begin_again(tmp_path: Path) -> None:
    job = tiny_job(
        "callbacks.last_checkpoint=null", "trainer.max_steps=2", "trainer.val_check_interval=2", "run_dir=run"
    )
    assert train(tmp_path, *job).code == 0
    best = tmp_path / "run/checkpoints/best.ckpt"
    before = best.read_bytes()
    again = train(tmp_path, *job, "ckpt_path=last")
    assert again.code == 2, again.out
    assert (
        "Error: ckpt_path='last' is not valid: expected the path of a checkpoint: the run has no last one" in again.err
    )
    assert "best.ckpt would be lost" in again.err
    assert best.read_bytes() == before
