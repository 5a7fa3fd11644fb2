"""train.py as a whole: a stopped and resumed run is the uninterrupted one, bit for bit; a run is never mixed up."""

import os
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from tests.support.comparing import assert_equal
from tests.support.forked import started
from tests.support.runs import TRAIN, assert_began, events, load, run, scalars, tiny_job, train

STEPS = 8
LONG = [f"trainer.max_steps={STEPS}", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=4"]
LONG += ["optim.schedule=constant", "callbacks.last_checkpoint.every_n_train_steps=3"]
BY_THE_CLOCK = {
    "train/tokens_per_second",
    "train/images_per_second",
    "1_overview/8_tokens_per_second",
    "1_overview/8_images_per_second",
    "train/mfu",
    "train/step_seconds_p50",
    "train/step_seconds_p95",
    "train/data_wait_share",
    "train/memory_peak",
    "hp_metric",
}
MODELS = {"dense": ["experiment=dense_spannorm"], "moe": ["experiment=moe_spannorm", "model.moe.jitter=0.3"]}
MODELS["masked"] = ["experiment=mlm_spannorm"]
MODELS["vision"] = ["experiment=vision_spannorm", "model.ffn=moe", "model.moe.jitter=0.3"]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name in ("dense", "moe") else pytest.mark.slow) for name in MODELS],
)
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
    found, expected = all_scalars(resumed, after), all_scalars(uninterrupted, after)
    assert {"train/loss", "optim/grad_norm", "val/loss", "updates/block_1/attn_out"} <= expected.keys()
    assert found.keys() == expected.keys()
    for tag, values in expected.items():
        assert found[tag] == values, tag
    ours, theirs = (load(path / "checkpoints/last.ckpt") for path in (resumed, uninterrupted))
    assert ours["global_step"] == theirs["global_step"] == STEPS
    data = {"PythonStdlib", "Digits"} & theirs.keys()
    assert len(data) == 1
    for part in ("state_dict", "optimizer_states", "lr_schedulers", *data):
        assert_equal(ours[part], theirs[part], part)
    losses = scalars(uninterrupted, "val/loss")
    assert load(resumed / "checkpoints/best.ckpt")["global_step"] == min(losses, key=losses.__getitem__) + 1


def all_scalars(folder: Path, after: int) -> dict[str, dict[int, float]]:
    """{tag: {step: value}} of a run from step `after` on, without those that a clock decides."""
    written = events(folder)
    tags = [tag for tag in written.Tags()["scalars"] if tag not in BY_THE_CLOCK]
    values = {tag: [(e.step, e.value) for e in written.Scalars(tag) if e.step >= after] for tag in tags}
    return {tag: dict(sorted(pairs)) for tag, pairs in values.items() if pairs}


@pytest.mark.parametrize("step", [4, 5], ids=["at a validation", "between validations"])
def test_interrupted_and_resumed_is_uninterrupted(
    tmp_path: Path, model: list[str], uninterrupted: Path, step: int
) -> None:
    interrupt = f"{{_target_: tests.support.signals.SendSignal, signum: {int(signal.SIGINT)}, step: {step}}}"
    interrupted = train(tmp_path, *tiny_job(*model), "run_dir=run", f"+callbacks.interrupt={interrupt}")
    assert interrupted.code == 130
    assert f"Interrupted: SIGINT after step {step}. Saved; go on with" in interrupted.out
    assert load(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == step
    assert not (tmp_path / "run/summary.json").exists()
    command = shlex.split(interrupted.out.splitlines()[-1])
    assert train(tmp_path, *command[2:]).code == 0
    assert_continues(tmp_path / "run", uninterrupted, at=step)


WAIT = """
import time
from pathlib import Path

import lightning as L

class Wait(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 7:
            Path("waiting").touch()
            while not Path("go").exists():
                time.sleep(0.05)
"""


@pytest.mark.parametrize("model", ["moe"], indirect=True)
def test_a_terminated_process_saves_and_its_command_resumes(
    tmp_path: Path, model: list[str], uninterrupted: Path
) -> None:
    (tmp_path / "mine.py").write_text(WAIT)
    with started(tmp_path, str(TRAIN), *tiny_job(*model, "+callbacks.mine._target_=mine.Wait")) as training:
        while not (tmp_path / "waiting").exists():
            assert training.process.is_alive(), training.finish().err
            time.sleep(0.05)
        os.kill(training.process.pid, signal.SIGTERM)
        (tmp_path / "go").touch()
        finished = training.finish()
    *_, message, resume = finished.out.splitlines()
    assert finished.code == 143
    assert message == "Interrupted: SIGTERM after step 4. Saved; go on with"
    assert resume.split()[:2] == ["python", str(TRAIN)]
    assert train(tmp_path, *shlex.split(resume)[2:]).code == 0
    (folder,) = (tmp_path / "runs/moe_spannorm").iterdir()
    assert_continues(folder, uninterrupted, at=4)


def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    twice = [f"+callbacks.{name}={{_target_: tests.support.signals.SendSignal, signum: 2, step: 2}}" for name in "ab"]
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
    assert "run_dir='run' is not valid: expected a folder without a run in it, or ckpt_path=last beside" in again.err
    assert train(tmp_path, *tiny_job("run_dir=run", "ckpt_path=last")).out.startswith(
        "The run in run has saved nothing"
    )
    assert load(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 2


@pytest.mark.parametrize(
    "end", [pytest.param(3, id="between validations"), pytest.param(4, id="at a validation", marks=pytest.mark.slow)]
)
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
