"""summary.json and the table that says the same."""

import json
import math
import platform
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from callbacks.console.run_summary import describe_epochs
from core.status import read as read_status
from core.status import read_summary
from datamodules.counting import bigram_loss, unigram_loss
from datamodules.shards import open_split
from datamodules.storage import LocalFolder, read_index
from lightning_modules.language_module import LanguageModule
from tests.support.job import ACCUMULATE, BATCH_SIZE, SEQ_LEN, STEPS, Job
from tests.support.runs import TEXT, corpus_root, load, scalars, tiny_job, train

KEYS = ["status", "reason", "loss_unit"]
KEYS += ["train_loss", "val_loss", "val_perplexity", "val_bits_per_byte", "bigram_loss", "unigram_loss"]
KEYS += ["figures", "main", "steps", "tokens"]
KEYS += ["tokens_per_second", "seconds", "total_seconds", "parameters", "active_parameters"]
KEYS += ["best_checkpoint", "last_checkpoint", "tensorboard", "watch", "resume", "provenance"]


@pytest.fixture(scope="module")
def summary(job: Job) -> dict[str, Any]:
    return json.loads((job.folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    """The one validation batch of the job, [4, 33]."""
    from datamodules.python_stdlib import PythonStdlib

    data = PythonStdlib(str(corpus_root()), SEQ_LEN, BATCH_SIZE, val_batches=1)
    (batch,) = data.val_dataloader()
    return batch["tokens"].numpy()


def test_it_holds_what_it_promises(summary: dict[str, Any], job: Job) -> None:
    assert list(summary) == KEYS
    assert summary["steps"] == STEPS
    assert summary["tokens"] == STEPS * ACCUMULATE * BATCH_SIZE * SEQ_LEN
    assert summary["train_loss"] == pytest.approx(scalars(job.folder, "train/loss")[STEPS - 1])
    assert summary["tokens_per_second"] > summary["tokens"] / summary["seconds"], "seconds include the validation"
    assert summary["tensorboard"] == "tensorboard --logdir run"
    assert summary["watch"] == "python -m tools.watch ."
    for name in ("best", "last"):
        assert summary[f"{name}_checkpoint"] == f"run/checkpoints/{name}.ckpt"
    assert f"trainer.max_steps={2 * STEPS} run_dir=run ckpt_path=last" in summary["resume"]


def test_the_validation_loss_is_that_of_the_saved_weights(
    summary: dict[str, Any], job: Job, windows: np.ndarray
) -> None:
    module = LanguageModule.load_from_checkpoint(job.folder / "checkpoints/last.ckpt", map_location="cpu").eval()
    tokens = torch.from_numpy(windows)
    with torch.no_grad():
        logits = module.model(tokens[:, :-1])[0]  # type: ignore[misc]
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert summary["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert summary["val_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    num_bytes = len(TEXT) // 10  # of the one validation document
    assert summary["val_bits_per_byte"] == pytest.approx(loss / math.log(2) * (num_bytes + 1) / num_bytes, rel=1e-5)


def test_the_baseline_sees_what_the_model_sees(summary: dict[str, Any], windows: np.ndarray) -> None:
    (folder,) = corpus_root().iterdir()
    assert summary["bigram_loss"] == pytest.approx(bigram_loss(open_split(folder, "train").tokens, windows, 257))
    assert summary["unigram_loss"] == pytest.approx(unigram_loss(open_split(folder, "train").tokens, windows, 257))


def test_it_says_what_made_it(summary: dict[str, Any], job: Job) -> None:
    found, (folder,) = summary["provenance"], corpus_root().iterdir()
    assert found["corpus"] == read_index(LocalFolder(folder)).digest
    assert (found["torch"], found["device"], found["python"]) == (
        torch.__version__,
        "1 x cpu",
        platform.python_version(),
    )
    assert read_summary(job.folder)["provenance"] == {name: value for name, value in found.items() if value is not None}
    assert str(found["commit"]) not in job.finished.out


def test_parameters_are_those_of_the_checkpoint(summary: dict[str, Any], job: Job) -> None:
    weights = load(job.folder / "checkpoints/last.ckpt")["state_dict"]
    sizes = {name: weight.numel() for name, weight in weights.items() if name.startswith("model.")}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert summary["parameters"] == sum(sizes.values())
    assert summary["active_parameters"] == sum(sizes.values()) - experts // 2  # two experts of four


def test_the_console_says_the_same(summary: dict[str, Any], job: Job) -> None:
    out = job.finished.out
    assert f"spannorm, moe, 2 blocks of dim 32: {summary['parameters']:,} parameters" in out
    table = out[out.index("Run summary") :]
    for key in ("train_loss", "val_loss", "val_perplexity", "val_bits_per_byte", "bigram_loss"):
        assert f"{summary[key]:,.4f}" in table
    assert f"{summary['tokens']:,}" in table
    assert "run/checkpoints/last.ckpt" in table
    assert f"Twice as long: {summary['resume']}\n" in out, "whole, and in one line"
    assert f"Curves and pictures: {summary['tensorboard']}\n" in out
    assert "The overview: http://localhost:6006/#custom_scalars\n" in out
    assert f"Beside other runs: {summary['watch']}\n" in out


def test_no_path_is_cut(tmp_path: Path) -> None:
    name = "a" * 90 + "/" + "b" * 90
    out = train(tmp_path, *tiny_job(f"run_dir={name}")).out
    table = out[out.index("Run summary") : out.index("┘")]
    rows = [line.split("│") for line in table.splitlines() if line.startswith("│")]
    assert len(rows[0][1]) + len(rows[0][2]) > 120, "as wide as a file may be, not as a terminal of 80 columns"
    assert f"{name}/checkpoints/last.ckpt" in "".join(row[2].strip() for row in rows)


def test_a_run_that_was_stopped_early_goes_on_to_its_own_end(tmp_path: Path) -> None:
    stop = "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss, min_delta: 99}"
    job = tiny_job(
        "run_dir=run", stop, "+callbacks.stop.patience=1", "trainer.max_steps=9", "trainer.val_check_interval=2"
    )
    out = train(tmp_path, *job).out
    resume = json.loads((tmp_path / "run/summary.json").read_text())["resume"]
    assert f"\nTo go on: {resume}\n" in out
    assert "Twice as long" not in out
    assert "trainer.max_steps=9" in shlex.split(resume)
    finished = train(tmp_path, *shlex.split(resume)[2:], "callbacks.stop.patience=99")
    assert finished.code == 0, finished.err
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 9


def test_a_run_whose_time_is_up_names_no_command_that_is_refused(tmp_path: Path) -> None:
    out = train(tmp_path, *tiny_job("run_dir=run", "trainer.max_steps=10000", "+trainer.max_time=00:00:00:01")).out
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "timed_out"
    assert summary["resume"] is None
    assert "Twice as long" not in out
    assert "To go on" not in out


def test_a_loss_that_is_no_number_is_null_and_the_file_stays_json(tmp_path: Path) -> None:
    bad = ("optim.lr=1e30", "optim.warmup_steps=0", "model.norm=none", "model.placement=prenorm")
    finished = train(tmp_path, *tiny_job("run_dir=run", *bad))
    assert finished.code == 3, finished.err
    assert "Diverged, after step 2 of 2: not finite at its end: train/loss, val/loss.\n" in finished.out
    assert "Twice as long" not in finished.out
    folder = tmp_path / "run"
    assert read_status(folder)["status"] == "diverged"

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    summary = json.loads((folder / "summary.json").read_text(), parse_constant=refuse)
    assert summary["status"] == "diverged"
    assert summary["resume"] is None
    assert summary["reason"] == "not finite at its end: train/loss, val/loss"
    assert summary["val_loss"] is summary["val_bits_per_byte"] is None
    assert summary["steps"] == 2


@pytest.mark.parametrize(("max_steps", "said"), [(40, None), (41, "8,200 tokens are 4 epochs of a corpus of 2,000")])
def test_a_corpus_that_is_read_too_often_is_named(max_steps: int, said: str | None) -> None:
    data = SimpleNamespace(num_train_tokens=2000, tokens_per_batch=100)
    trainer: Any = SimpleNamespace(datamodule=data, max_steps=max_steps, accumulate_grad_batches=2)
    line = describe_epochs(trainer)
    assert line is None if said is None else (line or "").startswith(said)
    trainer.datamodule = SimpleNamespace()
    assert describe_epochs(trainer) is None, "a stream without an end"
