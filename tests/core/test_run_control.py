"""What belongs to the run, whatever callbacks it has: signals, the last validation, the count of steps."""

import json
import os
import pickle
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from callbacks.checkpointing.last_checkpoint import LastCheckpoint
from core.run_control import RunControl, TrainingInterrupted, take_control
from lightning_modules.language_module import LanguageModule
from tests.support.fitting import Recorder, make_trainer
from tests.support.models import tiny_values
from tests.support.runs import DESCRIPTION, TinyData, load, scalars, tiny_job, train
from tests.support.signals import SendSignal

NOTHING: Any = None
LEFT_OUT = {  # the ways in which a run comes to have no last.ckpt
    "one callback off": ["callbacks.last_checkpoint=null"],
    "some groups": ["callbacks=[monitors,console]"],
    "no callbacks": ["callbacks=[]"],
    "no group": ["~callbacks"],
}
SEND = "+callbacks.send={{_target_: tests.support.signals.SendSignal, signum: {}, step: {}}}"


def job(*overrides: str) -> list[str]:
    """A tiny job whose callbacks may be any."""
    return [override for override in tiny_job(*overrides) if override != "callbacks.text_sample=null"]


class Trainer:
    """Stands in for Lightning's, and notes what its callbacks have saved."""

    def __init__(self, world_size: int = 1, other_rank: int = 0) -> None:
        self.world_size, self.global_step, self.max_steps, self.accumulate_grad_batches = world_size, 0, 100, 2
        progress = SimpleNamespace(total=SimpleNamespace(ready=3, started=2))
        self.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
        self.should_stop = self.is_last_batch = False
        largest = lambda mine, reduce_op: torch.maximum(mine, torch.tensor(other_rank))  # noqa: E731
        self.strategy = SimpleNamespace(
            root_device="cpu", reduce=largest, finish_saving=lambda: self.done.append("all")
        )
        self._signal_connector = SimpleNamespace(received_sigterm=False)
        self.done: list[Any] = []
        self.callbacks = [SimpleNamespace(save_before_leaving=lambda trainer: self.done.append(trainer.global_step))]


def steps(control: RunControl, trainer: Any, num_steps: int) -> None:
    for batch in range(2 * num_steps):
        control.on_train_batch_start(trainer, NOTHING, NOTHING, batch)
        trainer.global_step = (batch + 1) // 2
        control.on_train_batch_end(trainer, NOTHING, NOTHING, NOTHING, batch)


@pytest.mark.parametrize("other_rank", [0, signal.SIGTERM])
def test_all_processes_leave_after_the_step_in_which_one_got_a_signal(other_rank: int) -> None:
    trainer, control = Trainer(world_size=2, other_rank=other_rank), RunControl()
    if not other_rank:
        steps(control, trainer, num_steps=3)
        assert trainer.done == []
        return
    with pytest.raises(TrainingInterrupted) as interruption:
        steps(control, trainer, num_steps=3)
    assert trainer.done == [1, "all"], "saved, and what is written beside the training is waited for"
    left = interruption.value
    assert (left.signum, left.step, left.saved, left.code) == (signal.SIGTERM, 1, True, 143)


def test_the_last_step_asks_for_a_validation() -> None:
    trainer, control = Trainer(), RunControl()
    trainer.max_steps = 4
    steps(control, trainer, num_steps=3)
    assert not trainer.should_stop
    steps(control, trainer, num_steps=4)
    assert trainer.should_stop


def test_the_handlers_that_were_there_come_back() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before, control = [signal.getsignal(number) for number in numbers], RunControl()
    control.on_train_start(Trainer(), NOTHING)  # type: ignore[arg-type]
    signal.raise_signal(signal.SIGUSR1)  # would end this process, were it not taken note of
    assert control.received == signal.SIGUSR1
    control.on_exception(NOTHING, NOTHING, KeyboardInterrupt())
    assert [signal.getsignal(number) for number in numbers] == before


def test_an_interruption_says_what_happened_in_another_process_too() -> None:
    there = pickle.loads(pickle.dumps(TrainingInterrupted(signal.SIGTERM, 7, saved=False)))
    assert (str(there), there.code, there.saved) == ("SIGTERM after step 7", 143, False)


def test_a_trainer_is_controlled_once_and_last(tmp_path: Path) -> None:
    trainer = L.Trainer(logger=False, default_root_dir=tmp_path, enable_progress_bar=False)
    take_control(trainer)
    take_control(trainer)
    kinds = [type(callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    assert kinds.count(RunControl) == 1
    assert kinds[-1] is RunControl, "behind the checkpoints, which Lightning has put last"


@pytest.mark.parametrize("way", LEFT_OUT)
def test_the_last_step_has_a_validation_of_its_own(way: str, tmp_path: Path) -> None:
    lengths = ["trainer.max_steps=3", "trainer.val_check_interval=2", "run_dir=run"]
    finished = train(tmp_path, *job(*lengths, *LEFT_OUT[way]))
    assert finished.code == 0, finished.err
    losses = scalars(tmp_path / "run", "val/loss")
    assert list(losses) == [1, 2], "of step 2, by the interval, and of step 3, as the loggers count"
    saved = [path.name for path in (tmp_path / "run").rglob("*.ckpt")]
    assert saved == (["best.ckpt"] if way == "one callback off" else []), "and no checkpoint of Lightning's own accord"
    assert "Epoch" not in finished.out, "nor a progress bar"
    if (tmp_path / "run/summary.json").exists():
        summary = json.loads((tmp_path / "run/summary.json").read_text())
        assert (summary["steps"], summary["val_loss"]) == (3, pytest.approx(losses[2]))
        assert (summary["last_checkpoint"], summary["resume"]) == (None, None)


@pytest.mark.parametrize(
    ("name", "way"),
    [*(("SIGTERM", way) for way in LEFT_OUT), *((name, "some groups") for name in ("SIGINT", "SIGUSR1"))],
)
def test_a_signal_ends_the_run_behind_a_step_with_its_own_code(name: str, way: str, tmp_path: Path) -> None:
    signum = int(getattr(signal, name))
    lengths = ["trainer.max_steps=6", "trainer.val_check_interval=6", "run_dir=run"]
    finished = train(tmp_path, *job(*lengths, *LEFT_OUT[way], SEND.format(signum, 3)))
    assert finished.code == 128 + signum, finished.err
    assert f"Interrupted: {name} after step 3. Not saved, as callbacks.last_checkpoint is off." in finished.out
    assert list(scalars(tmp_path / "run", "train/loss")) == [0, 1, 2], "the step's own metrics are written"
    assert not (tmp_path / "run/checkpoints/last.ckpt").exists()
    if (tmp_path / "run/status.json").exists():
        status = json.loads((tmp_path / "run/status.json").read_text())["status"]
        assert status == ("timed_out" if name == "SIGUSR1" else "stopped"), "a scheduler's, before the time is up"


def test_an_unsaved_job_is_not_requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would do the same steps again and again, until somebody looks."""
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/asked\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")  # interactive: Lightning leaves the launching to us
    lengths = ["trainer.max_steps=6", "trainer.val_check_interval=6"]
    for name, off in (("saved", []), ("not", ["callbacks.last_checkpoint=null"])):
        finished = train(tmp_path, *tiny_job(*lengths, f"run_dir={name}", *off, SEND.format(int(signal.SIGUSR1), 3)))
        assert finished.code == 128 + signal.SIGUSR1, finished.err
        assert ("Requeued SLURM job 7." in finished.out) is (name == "saved")
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


class Early(L.Callback):
    """This process gets a signal in a hook that comes before the first step."""

    def __init__(self, hook: str, signum: int) -> None:
        self.signum = signum
        setattr(self, hook, self._send)

    def _send(self, *_: Any) -> None:
        os.kill(os.getpid(), self.signum)


@pytest.mark.parametrize("hook", ["on_sanity_check_start", "on_sanity_check_end"])
def test_a_sigterm_before_the_first_step_is_not_taken_for_a_ctrl_c(hook: str, tmp_path: Path) -> None:
    """Lightning has noted it, and would leave amid the first step with nothing saved, in the way of a Ctrl-C."""
    early = f"+callbacks.early={{_target_: {__name__}.Early, hook: {hook}, signum: {int(signal.SIGTERM)}}}"
    lengths = ["trainer.max_steps=4", "trainer.num_sanity_val_steps=2", "data.val_batches=3", "run_dir=run"]
    finished = train(tmp_path, *tiny_job(*lengths, early))
    assert finished.code == 143, finished.err
    if hook == "on_sanity_check_start":  # Lightning itself looks between two batches of a validation
        assert "Interrupted at once; there was nothing to save." in finished.out
    else:
        assert "Interrupted: SIGTERM after step 1. Saved; go on with" in finished.out
        assert load(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 1


def test_a_rollback_that_nobody_would_keep_snapshots_for_is_refused(tmp_path: Path) -> None:
    for off in (["callbacks.last_checkpoint=null"], ["callbacks=[monitors,divergence]"]):
        refused = train(tmp_path, *job("run_dir=run", *off, "callbacks.divergence.policy=rollback"))
        assert refused.code == 2
        assert refused.err.startswith("Error: callbacks.divergence.policy='rollback' is not valid: its snapshots are")
        assert "callbacks.last_checkpoint, which is off" in refused.err
        assert len(refused.err.splitlines()) == 1
        assert not (tmp_path / "run").exists()


class Steps(Recorder):
    """Keeps the step under which each value was logged, as loggers count."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        super().log_metrics({key: float(step if step is not None else -1) for key in metrics})


def fit(root: Path, *callbacks: L.Callback, ckpt_path: Path | None = None) -> Steps:
    """Five steps under a Trainer of one's own, validated every second step."""
    steps, saving = Steps(), any(isinstance(callback, LastCheckpoint) for callback in callbacks)
    lengths = {"max_steps": 5, "val_check_interval": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    own = {"logger": steps, "enable_checkpointing": saving, "callbacks": list(callbacks)}
    module = LanguageModule(tiny_values(), {"warmup_steps": 1}, DESCRIPTION["vocab_size"])
    make_trainer(root, **own, **lengths).fit(module, datamodule=TinyData(root), ckpt_path=ckpt_path, weights_only=True)
    return steps


@pytest.mark.parametrize("saves", [True, False])
def test_under_a_trainer_of_ones_own_a_signal_ends_the_process_alike(saves: bool, tmp_path: Path) -> None:
    saving = [LastCheckpoint(str(tmp_path), 100)] if saves else []
    with pytest.raises(SystemExit) as left:  # which ends the process, as nobody catches it
        fit(tmp_path, SendSignal(signal.SIGTERM, 3), *saving)
    assert left.value.code == 143
    assert (tmp_path / "last.ckpt").exists() is saves
    assert not saves or load(tmp_path / "last.ckpt")["global_step"] == 3


def test_under_a_trainer_of_ones_own_the_last_step_is_validated_and_resumed_steps_are_counted(tmp_path: Path) -> None:
    """Without a callback of ours in the second Trainer, which goes on from the first one's checkpoint."""

    whole = fit(tmp_path, LastCheckpoint(str(tmp_path), 2))
    assert (whole.series("train/loss"), whole.series("val/loss")) == ([0, 1, 2, 3, 4], [1, 3, 4])
    rest = fit(tmp_path, ckpt_path=tmp_path / "previous.ckpt")  # of step 4, saved around a validation
    assert (rest.series("train/loss"), rest.series("val/loss")) == ([4], [4])
