"""Lightning's own settings and callbacks in a run of ours: they work as they do elsewhere, or one line refuses them."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from tests.support.runs import events, load, run, scalars, tiny_job, train

LIGHTNING = "lightning.pytorch.callbacks"
ACCUMULATE = f"+callbacks.mine={{_target_: {LIGHTNING}.GradientAccumulationScheduler, scheduling: {{0: 2}}}}"
REFUSED: dict[str, tuple[list[str], list[str]]] = {  # overrides, and what the line says
    "a time between validations": (["trainer.val_check_interval='00:00:00:05'"], ["val_check_interval='00:00:00:05'"]),
    "a rate of its own": ([f"+callbacks.mine._target_={LIGHTNING}.LearningRateFinder"], ["mine", "sweep", "optim.lr"]),
    "a batch of its own": ([f"+callbacks.mine._target_={LIGHTNING}.BatchSizeFinder"], ["mine", "micro_batch_size"]),
    "averages by epochs": (
        [f"+callbacks.mine={{_target_: {LIGHTNING}.StochasticWeightAveraging, swa_lrs: 1e-3, swa_epoch_start: 1}}"],
        ["mine", "single epoch", "EMAWeightAveraging"],
    ),
    "epochs that never come": (
        [f"+callbacks.mine={{_target_: {LIGHTNING}.GradientAccumulationScheduler, scheduling: {{0: 2, 4: 8}}}}"],
        ["callbacks.mine.scheduling", "single epoch"],
    ),
    "accumulation twice": (
        [ACCUMULATE, "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=2"],
        ["callbacks.mine.scheduling", "trainer.accumulate_grad_batches"],
    ),
    "accumulation and micro batches": ([ACCUMULATE, "micro_batch_size=2"], ["mine.scheduling", "micro_batch_size"]),
    "a validation amid a step": (
        [ACCUMULATE, "trainer.val_check_interval=3"],
        ["trainer.val_check_interval=3", "a multiple of 2"],
    ),
    "an average that stands still": (
        [f"+callbacks.mine._target_={LIGHTNING}.EMAWeightAveraging", "trainer.precision=bf16-true"],
        ["trainer.precision='bf16-true'", "bf16-mixed", "EMAWeightAveraging"],
    ),
    "an average of parts": (
        [f"+callbacks.mine._target_={LIGHTNING}.EMAWeightAveraging", "trainer=fsdp", "trainer.accelerator=cpu"],
        ["callbacks", "EMAWeightAveraging", "averages weights with trainer=fsdp"],
    ),
    "a warm-up in the decay": (
        ["optim.schedule=wsd", "optim.warmup_steps=8", "trainer.max_steps=10", "optim.decay_fraction=0.5"],
        ["optim.warmup_steps=8", "at most 5", "wsd decays over the last 5"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_line_refuses(name: str, tmp_path: Path) -> None:
    overrides, said = REFUSED[name]
    finished = train(tmp_path, *tiny_job("run_dir=run", *overrides))
    assert finished.code == 2, finished.out[-500:] + finished.err[-500:]
    (line,) = finished.err.strip().splitlines()
    assert all(words in line for words in said), line
    assert not (tmp_path / "run").exists()


def test_a_wsd_schedule_that_never_decays_is_said(tmp_path: Path) -> None:
    job = ["optim.schedule=wsd", "optim.warmup_steps=0", "trainer.max_steps=3", "run_dir=r"]
    ended = train(tmp_path, *tiny_job(*job))
    assert ended.code == 0
    assert "Learning rate: optim.decay_fraction=0.2 of 3 steps is one step" in ended.out
    assert len(set(scalars(tmp_path / "r", "optim/lr").values())) == 1


def test_a_wsd_schedule_that_fits_has_no_jump(tmp_path: Path) -> None:
    job = ["optim.schedule=wsd", "optim.warmup_steps=5", "trainer.max_steps=10", "optim.decay_fraction=0.5"]
    rates = list(scalars(run(tmp_path, "run", *job), "optim/lr").values())
    assert max(abs(b - a) for a, b in itertools.pairwise(rates)) <= 3e-3 / 5 + 1e-9


def test_the_time_of_a_run_ends_it_with_a_reason(tmp_path: Path) -> None:
    job = tiny_job("run_dir=run", "trainer.max_steps=100000", "+trainer.max_time=00:00:00:02", "+trainer.min_steps=1")
    finished = train(tmp_path, *job)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert finished.code == 0
    assert status["status"] == "timed_out"
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert {key: summary[key] for key in ("status", "reason")} == {key: status[key] for key in ("status", "reason")}
    assert 1 <= status["step"] < 100000
    reason = "the time of 0:00:02 (trainer.max_time or a Timer) is used up, and counts from the run's first step"
    assert status["reason"] == reason
    assert f"Ended early, after step {status['step']} of 100000: {reason}.\n" in finished.out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}

    again = train(tmp_path, *job, "ckpt_path=last")
    assert again.code == 2
    said = r"trainer.max_time='0:00:02' is not valid: expected more than 0:00:\d\d, which the run has trained"
    assert re.search(said, again.err)  # a busy machine takes longer than the time it is given
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before

    step = status["step"]
    more = [*job[:-2], f"trainer.max_steps={step + 2}", "+trainer.max_time=01:00:00:00", "ckpt_path=last"]
    assert train(tmp_path, *more).code == 0
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["status"], status["step"], status["reason"]) == ("done", step + 2, None)


def test_the_time_of_a_timer_is_not_blamed_on_another_setting(tmp_path: Path) -> None:
    timer = f"+callbacks.mine={{_target_: {LIGHTNING}.Timer, duration: '00:00:00:01'}}"
    job = tiny_job("run_dir=run", "trainer.max_steps=100000", timer)
    assert "the time of 0:00:01 (trainer.max_time or a Timer) is used up" in train(tmp_path, *job).out
    again = train(tmp_path, *job, "ckpt_path=last")
    assert again.code == 2
    assert "callbacks.mine.duration='0:00:01' is not valid: expected more than 0:00:0" in again.err


@pytest.mark.parametrize(
    ("schedule", "warmup", "said"), [("cosine", 3, True), ("constant", 9, True), ("cosine", 2, False)]
)
def test_a_warm_up_without_an_end_is_said(schedule: str, warmup: int, said: bool, tmp_path: Path) -> None:
    job = tiny_job("run_dir=run", f"optim.schedule={schedule}", f"optim.warmup_steps={warmup}", "trainer.max_steps=3")
    finished = train(tmp_path, *job)
    highest = list(scalars(tmp_path / "run", "optim/lr").values())[-1]
    line = (
        f"Learning rate: optim.warmup_steps={warmup} takes up the whole run of 3 steps: the rate rises to {highest:.3g}"
    )
    assert (line in finished.out) == said


@pytest.mark.parametrize("name", ["a rate of its own", "epochs that never come", "accumulation and micro batches"])
def test_a_callback_is_refused_before_data_are_prepared(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare_data(*_: Any) -> None:
        raise AssertionError("data are prepared for a run that is refused")

    monkeypatch.setattr("datamodules.python_stdlib.PythonStdlib.prepare_data", prepare_data)
    overrides, said = REFUSED[name]
    finished = train(tmp_path, *tiny_job(*overrides))
    assert finished.code == 2
    assert all(words in finished.err for words in said), finished.err


def test_early_stopping_ends_a_run_with_a_reason(tmp_path: Path) -> None:
    stopping = f"{{_target_: {LIGHTNING}.EarlyStopping, monitor: val/loss, patience: 1, min_delta: 100}}"
    job = ["trainer.max_steps=50", "trainer.val_check_interval=2", f"+callbacks.mine={stopping}"]
    finished = train(tmp_path, *tiny_job(*job, "run_dir=run"))
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (finished.code, status["status"], status["step"]) == (0, "stopped", 4)
    assert status["reason"].startswith("EarlyStopping: Monitored metric val/loss did not improve in the last 1 records")
    assert f"Ended early, after step 4 of 50: {status['reason']}.\n" in finished.out


class Enough(L.Callback):
    """Stops a run as callbacks of one's own do."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 2


def test_a_callback_of_ones_own_ends_a_run_with_a_reason(tmp_path: Path) -> None:
    mine = "+callbacks.mine._target_=tests.test_lightning_settings.Enough"
    folder = run(tmp_path, "run", "trainer.max_steps=5", mine)
    status = json.loads((folder / "status.json").read_text())
    assert (status["status"], status["step"]) == ("stopped", 2)
    assert status["reason"] == "a callback has set trainer.should_stop"
    assert load(folder / "checkpoints/last.ckpt")["global_step"] == 2


class Epochs(L.Callback):
    """Sets itself up where the epoch begins, as a progress bar does."""

    begun = 0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        Epochs.begun += 1
        self.ready = True

    def on_train_batch_start(self, *_: Any) -> None:
        assert self.ready


@pytest.mark.parametrize("validated", [pytest.param(True, marks=pytest.mark.slow), False])
def test_callbacks_that_set_themselves_up_in_an_epoch_do_so_in_a_resumed_one(validated: bool, tmp_path: Path) -> None:
    epochs = "+callbacks.epochs._target_=tests.test_lightning_settings.Epochs"
    every = ["trainer.val_check_interval=6", "optim.schedule=constant", epochs, ACCUMULATE]
    every += [] if validated else ["trainer.limit_val_batches=0", "callbacks.best_checkpoint=null"]
    whole = run(tmp_path, "whole", "trainer.max_steps=5", *every)
    assert Epochs.begun == 1
    run(tmp_path, "run", "trainer.max_steps=3", *every)
    resumed = run(tmp_path, "run", "trainer.max_steps=5", *every, "ckpt_path=last")
    assert Epochs.begun == 3
    Epochs.begun = 0
    for tag in ("train/loss", "train/tokens", "optim/grad_norm"):
        assert scalars(resumed, tag) == scalars(whole, tag), "as if it had not stopped"
    ours, theirs = (load(folder / "checkpoints/last.ckpt") for folder in (resumed, whole))
    assert ours["PythonStdlib"] == theirs["PythonStdlib"]
    assert all(torch.equal(ours["state_dict"][name], theirs["state_dict"][name]) for name in theirs["state_dict"])


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
@pytest.mark.parametrize("validated", [pytest.param(True, marks=pytest.mark.slow), False])
def test_an_average_of_the_weights_does_not_take_their_place(validated: bool, tmp_path: Path) -> None:
    average = f"+callbacks.mine={{_target_: {LIGHTNING}.EMAWeightAveraging, decay: 0.9}}"
    none = [] if validated else ["trainer.limit_val_batches=0", "callbacks.best_checkpoint=null"]
    job = ["optim.schedule=constant", *none]
    plain = run(tmp_path, "plain", "trainer.max_steps=6", *job)
    run(tmp_path, "run", "trainer.max_steps=3", *job, average)
    raw = load(run(tmp_path, "half", "trainer.max_steps=3", *job) / "checkpoints/last.ckpt")["state_dict"]
    saved = load(tmp_path / "run/checkpoints/last.ckpt")
    for name, weights in raw.items():
        assert torch.equal(saved["current_model_state"][name], weights)
    assert not all(torch.equal(saved["state_dict"][name], weights) for name, weights in raw.items())
    resumed = run(tmp_path, "run", "trainer.max_steps=6", *job, average, "ckpt_path=last")
    assert scalars(resumed, "train/loss") == scalars(plain, "train/loss")


@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_double_precision_trains(ffn: str, tmp_path: Path) -> None:
    folder = run(tmp_path, "run", f"experiment={ffn}_spannorm", "trainer.precision=64-true")
    weights = load(folder / "checkpoints/last.ckpt")["state_dict"]
    assert weights["model.embedding.weight"].dtype == torch.float64
    assert all(5 < loss < 7 for loss in scalars(folder, "val/loss").values())  # ln 257 = 5.5
    parts = [f"gradients/{part}" for part in ("block_1/all", "block_2/all", "embedding", "head")]
    parts += [tag for tag in ("gradients/norm",) if tag in events(folder).Tags()["scalars"]]
    for step, norm in scalars(folder, "optim/grad_norm").items():
        squares = [scalars(folder, part)[step] ** 2 for part in parts]
        assert sum(squares) ** 0.5 <= norm * (1 + 1e-6)
        assert sum(squares) ** 0.5 == pytest.approx(norm, rel=1e-2), "but for the norm behind the last block"


LENGTHEN = ["optim.warmup_steps=2", "trainer.max_steps=8"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps of which checkpoint of step 4 is kept too."""
    keep = ["callbacks.best_checkpoint.save_top_k=-1", "callbacks.best_checkpoint.filename='{step}'"]
    root = tmp_path_factory.mktemp("finished")
    return run(root, "run", *LENGTHEN, "trainer.val_check_interval=4", *keep)


def resumed_line(folder: Path, root: Path, *overrides: str, step: int = 4) -> str | None:
    """What a resumption says of the learning rate, and that its figures are true."""
    job = tiny_job(*LENGTHEN, f"ckpt_path='{folder}/checkpoints/step={step}.ckpt'", "run_dir=elsewhere", *overrides)
    resumed = train(root, *job)
    assert resumed.code == 0, resumed.err
    lines = [line for line in resumed.out.splitlines() if line.startswith("Learning rate: ")]
    assert len(lines) <= 1
    rates = scalars(root / "elsewhere", "optim/lr")
    if lines:
        said = [f"{rates[step]:.3g} at step {step + 1}", f"{rates[step + 1]:.3g} at step {step + 2}"]
        said.append(f"{list(rates.values())[-1]:.3g} at the end, step {list(rates)[-1] + 1}")
        assert ", ".join(said) in lines[0]
    return lines[0] if lines else None


def test_a_longer_run_says_that_the_rate_rises_again(finished: Path, tmp_path: Path) -> None:
    line = resumed_line(finished, tmp_path, "trainer.max_steps=12", step=8)
    assert line is not None
    assert "optim.schedule=cosine goes by trainer.max_steps, 8 before and 12 now" in line
    assert "begin with the final trainer.max_steps, or with optim.schedule=wsd" in line


def test_a_longer_run_says_how_the_old_curve_is_kept(finished: Path, tmp_path: Path) -> None:
    line = resumed_line(finished, tmp_path, "trainer.max_steps=12")
    assert line is not None
    assert "trainer.max_steps=8 with the same optim settings keeps the curve" in line


@pytest.mark.parametrize("overrides", [[], ["trainer.val_check_interval=2"]])
def test_the_same_run_says_nothing(overrides: list[str], finished: Path, tmp_path: Path) -> None:
    assert resumed_line(finished, tmp_path, *overrides) is None
    assert scalars(tmp_path / "elsewhere", "optim/lr").items() <= scalars(finished, "optim/lr").items()


def test_another_schedule_is_said(finished: Path, tmp_path: Path) -> None:
    line = resumed_line(finished, tmp_path, "optim.schedule=constant")
    assert line is not None
    assert "optim.schedule=constant is not the checkpoint's schedule" in line


def test_data_of_another_class_are_refused(finished: Path, tmp_path: Path) -> None:
    job = [argument for argument in tiny_job(*LENGTHEN, "trainer.max_steps=9") if not argument.startswith("data.root")]
    other = ["data=synthetic", "data.task=copy", "data.vocab_size=257", f"ckpt_path='{finished}/checkpoints/last.ckpt'"]
    refused = train(tmp_path, *job, *other, "run_dir=elsewhere")
    assert refused.code == 2
    expected = "Error: data._target_='Synthetic' is not valid: expected PythonStdlib, as in the checkpoint that is"
    assert refused.err.startswith(expected), refused.err


def test_a_metric_that_nobody_logs_is_named_with_those_there_are(tmp_path: Path) -> None:
    stop = "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val_loss}"
    finished = train(tmp_path, *tiny_job("run_dir=run", stop))
    assert finished.code == 2
    (said,) = [line for line in finished.err.splitlines() if line.startswith("Error: ")]
    assert said.startswith("Error: Early stopping conditioned on metric `val_loss` which is not available.")
    assert "`val/loss`" in said
    assert "Traceback" not in finished.err
