"""The progress bar, and the plain lines where there is no terminal."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from callbacks.console.progress import StepProgress
from lightning_modules.language_module import LanguageModule
from tests.support.job import ACCUMULATE, STEPS, Job
from tests.support.recorder import Recorder
from tests.support.runs import scalars, tiny_job, train


def test_without_a_terminal_it_prints_plain_lines(job: Job) -> None:
    pattern = r"^step (\d)/5  loss ([\d.]+)(?:  [\d,]+ tokens/s)?  (\d+:\d\d) left$"
    lines = re.findall(pattern, job.finished.out, re.MULTILINE)
    assert [int(step) for step, _, _ in lines] == list(range(1, STEPS + 1))
    last_batches = Recorder.losses[ACCUMULATE - 1 :: ACCUMULATE]
    assert [float(loss) for _, loss, _ in lines] == pytest.approx(last_batches, abs=1e-3)
    assert lines[-1][2] == "0:00"
    assert len(re.findall(r"tokens/s", job.finished.out)) >= STEPS - 1
    assert "\x1b" not in job.finished.out


def test_each_validation_has_its_line(job: Job) -> None:
    found = re.findall(r"^step (\d): validation loss ([\d.]+)$", job.finished.out, re.MULTILINE)
    expected = {step + 1: round(loss, 4) for step, loss in scalars(job.folder, "val/loss").items()}
    assert {int(step): float(loss) for step, loss in found} == pytest.approx(expected)


def test_on_a_terminal_it_is_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    finished = train(tmp_path, *tiny_job("run_dir=run", "callbacks.progress.refresh_seconds=0"))
    assert finished.code == 0
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", finished.out)
    assert re.search(r"━+ step 2/2  loss \d\.\d{3}  [\d,]+ tokens/s 0:00:0\d 0:00:00", plain)
    assert finished.out.count("\x1b[?25l") == finished.out.count("\x1b[?25h") == 1, "the cursor comes back"


def test_time_left_follows_the_steps_of_this_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of 60 steps that was resumed at 20: ten steps have taken 25 seconds."""
    progress, nothing = StepProgress(line_seconds=20), SimpleNamespace(task=LanguageModule.task)
    trainer: Any = SimpleNamespace(
        global_step=20, max_steps=60, max_epochs=-1, accumulate_grad_batches=1, is_last_batch=False, callback_metrics={}
    )
    for step, now in ((20, 1000.0), (30, 1025.0)):
        trainer.global_step = step
        monkeypatch.setattr("callbacks.console.progress.time.monotonic", lambda now=now: now)
        if step == 20:
            progress.on_train_start(trainer, nothing)  # type: ignore[arg-type]
        else:
            progress.on_train_batch_end(trainer, nothing, {"loss": torch.tensor(2.5)}, None, 0)  # type: ignore[arg-type]
    assert capsys.readouterr().out == "step 30/60  loss 2.500  1:15 left\n"


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    finished = train(tmp_path, *tiny_job("run_dir=run", "callbacks.progress=null"))
    assert finished.code == 0
    assert "loss 5" not in finished.out


def test_a_lightning_module_of_ones_own_need_not_state_a_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_steps=2, callbacks=[StepProgress()], default_root_dir=tmp_path, **quiet)
    trainer.fit(BoringModel(), DataLoader(torch.randn(8, 32), batch_size=2))
    assert "step 2/2  loss " in capsys.readouterr().out
