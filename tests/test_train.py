"""train.py as a whole: a stopped and resumed run is the uninterrupted one, bit for bit; a run is never mixed up."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers_run import TRAIN, load, run, scalars, tiny_job, train

STEPS = 8
LONG = [f"trainer.max_steps={STEPS}", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=4"]
LONG += ["optim.schedule=constant", "callbacks.last_checkpoint.every_n_train_steps=3"]
MODELS = {"dense": ["experiment=dense_spannorm"], "moe": ["experiment=moe_spannorm", "model.moe.jitter=0.3"]}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> list[str]:
    """A run of 8 steps of 2 batches each, validated and saved every second step, and saved every third."""
    return [*MODELS[request.param], *LONG]


@pytest.fixture(scope="module")
def uninterrupted(model: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference; it keeps its checkpoint of every validation."""
    keep = ["callbacks.best_checkpoint.save_top_k=-1", "callbacks.best_checkpoint.filename='{step}'"]
    return run(tmp_path_factory.mktemp("uninterrupted"), "run", *model, *keep)


def assert_continues(resumed: Path, uninterrupted: Path, at: int, after: int = 0) -> None:
    """It went on at step `at`, and every scalar after step `after`, the final weights, optimizer and position are
    equal, bit for bit."""
    assert_began(resumed, at)
    for tag in ("train/loss", "optim/grad_norm", "optim/lr", "train/tokens", "val/loss"):
        expected = {step: value for step, value in scalars(uninterrupted, tag).items() if step >= after}
        assert len(expected) > 1
        assert {step: value for step, value in scalars(resumed, tag).items() if step >= after} == expected, tag
    ours, theirs = (load(path / "checkpoints/last.ckpt") for path in (resumed, uninterrupted))
    assert ours["global_step"] == theirs["global_step"] == STEPS
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "PythonStdlib"):
        assert_equal(ours[part], theirs[part], part)
    losses = scalars(uninterrupted, "val/loss")
    assert load(resumed / "checkpoints/best.ckpt")["global_step"] == min(losses, key=losses.__getitem__) + 1


def assert_began(folder: Path, step: int) -> None:
    """A run that starts again from nothing would give the same curve; the last process' own events tell them apart."""
    newest = max((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    first, *_ = EventAccumulator(str(newest), size_guidance={"scalars": 0}).Reload().Scalars("train/loss")
    assert first.step == step


def assert_equal(ours: Any, theirs: Any, where: str) -> None:
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, dict | list):
        ours, theirs = (dict(enumerate(x)) if isinstance(x, list) else x for x in (ours, theirs))
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_equal(ours[key], theirs[key], f"{where}.{key}")
    else:
        assert ours == theirs, where


class SendSignal(L.Callback):
    """This process gets a signal amid the second batch of a step."""

    def __init__(self, signum: int, step: int) -> None:
        self.signum, self.step = signum, step

    def on_before_zero_grad(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step - 1:
            signal.raise_signal(self.signum)


@pytest.mark.parametrize("step", [4, 5], ids=["at a validation", "between validations"])
def test_interrupted_and_resumed_is_uninterrupted(
    tmp_path: Path, model: list[str], uninterrupted: Path, step: int
) -> None:
    interrupt = f"{{_target_: tests.test_train.SendSignal, signum: {int(signal.SIGINT)}, step: {step}}}"
    interrupted = train(tmp_path, *tiny_job(*model), "run_dir=run", f"+callbacks.interrupt={interrupt}")
    assert interrupted.code == 130
    assert f"Interrupted: SIGINT after step {step}. Saved; go on with" in interrupted.out
    assert load(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == step
    assert not (tmp_path / "run/summary.json").exists()
    command = shlex.split(interrupted.out.splitlines()[-1])
    assert train(tmp_path, *command[2:]).code == 0
    assert_continues(tmp_path / "run", uninterrupted, at=step)


WAIT = """
import lightning as L

class Wait(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 7:
            print("waiting", flush=True)
            input()
"""


@pytest.mark.parametrize("model", ["moe"], indirect=True)
def test_a_terminated_process_saves_and_its_command_resumes(
    tmp_path: Path, model: list[str], uninterrupted: Path
) -> None:
    (tmp_path / "mine.py").write_text(WAIT)
    command = [sys.executable, str(TRAIN), *tiny_job(*model, "+callbacks.mine._target_=mine.Wait")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) as process:
        try:
            while process.stdout.readline() not in ("waiting\n", ""):
                pass
            process.send_signal(signal.SIGTERM)
            out, _ = process.communicate("go on\n", timeout=120)
        finally:
            process.kill()
    *_, message, resume = out.splitlines()
    assert process.returncode == 143
    assert message == "Interrupted: SIGTERM after step 4. Saved; go on with"
    assert resume.split()[:2] == ["python", str(TRAIN)]
    assert train(tmp_path, *shlex.split(resume)[2:]).code == 0
    (folder,) = (tmp_path / "runs/moe_spannorm").iterdir()
    assert_continues(folder, uninterrupted, at=4)


def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    twice = [f"+callbacks.{name}={{_target_: tests.test_train.SendSignal, signum: 2, step: 2}}" for name in "ab"]
    handler = signal.getsignal(signal.SIGINT)
    try:
        finished = train(tmp_path, *tiny_job("trainer.max_steps=4", "run_dir=run"), *twice)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    assert finished.code == 130
    assert finished.out.endswith("Interrupted at once; there was nothing to save.\n")
    assert not (tmp_path / "run/checkpoints").exists()


class Press(L.Callback):
    """Ctrl-C while the model is being built."""

    def on_fit_start(self, *_: Any) -> None:
        raise KeyboardInterrupt


def test_ctrl_c_before_the_first_step_says_that_nothing_was_saved(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    try:
        finished = train(tmp_path, *tiny_job("run_dir=run", "+callbacks.press._target_=tests.test_train.Press"))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert finished.code == 130
    assert finished.out.endswith("Interrupted at once; there was nothing to save.\n")
    again = train(tmp_path, *tiny_job("run_dir=run"))
    assert "run_dir='run' is not valid" in again.err
    assert "saved no checkpoint that could be resumed" in again.err


@pytest.mark.parametrize("end", [3, 4], ids=["between validations", "at a validation"])
def test_a_finished_run_can_be_made_longer(tmp_path: Path, model: list[str], uninterrupted: Path, end: int) -> None:
    run(tmp_path, "run", *model, f"trainer.max_steps={end}")
    first = (tmp_path / "run/config.yaml").read_bytes()
    run(tmp_path, "run", *model, "ckpt_path=last")
    assert_continues(tmp_path / "run", uninterrupted, at=end, after=end)
    assert (tmp_path / "run/config.yaml").read_bytes() == first
    assert len(list((tmp_path / "run").glob("config-resumed-*.yaml"))) == 1


def test_a_checkpoint_saved_at_a_validation_resumes(tmp_path: Path, model: list[str], uninterrupted: Path) -> None:
    checkpoint = uninterrupted / "checkpoints/step=4.ckpt"
    assert load(checkpoint)["global_step"] == 4
    resumed = run(tmp_path, "elsewhere", *model, f"ckpt_path='{checkpoint}'")
    assert_continues(resumed, uninterrupted, at=4, after=4)


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
        train(tmp_path, *tiny_job("run_dir=run", "+callbacks.fail._target_=tests.test_train.Fail"))
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
    assert sorted(path.name for path in (tmp_path / "runs/default").iterdir()) == ["now", "now-2"]
