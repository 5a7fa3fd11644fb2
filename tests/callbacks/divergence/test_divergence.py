"""Real runs in which something goes wrong: what is said, where it is kept, and what the run does then."""

import json
import re
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from callbacks.divergence.divergence import Divergence
from callbacks.divergence.flight_recorder import FlightRecorder
from core.errors import ConfigError
from tests.support.fitting import fit
from tests.support.models import make_module, tokens
from tests.support.runs import Finished, corpus_root, events, load, run, scalars, tiny_job, train

STEPS, ACCUMULATE, BATCH_SIZE, STRUCK = 8, 2, 4, 6
JOB = [f"trainer.max_steps={STEPS}", f"trainer.accumulate_grad_batches={ACCUMULATE}", "experiment=dense_prenorm"]
NAN = f"+callbacks.fault={{_target_: tests.support.sabotage.NaNGradient, first: {STRUCK}}}"
SAMPLES = [(STRUCK - 1) * ACCUMULATE * BATCH_SIZE, STRUCK * ACCUMULATE * BATCH_SIZE - 1]


def policy(name: str) -> str:
    return f"callbacks.divergence.policy={name}"


@pytest.fixture(scope="module")
def skipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Path]:
    """A run of which one entry of one gradient was no number at one step, which was skipped."""
    cwd = tmp_path_factory.mktemp("skipped")
    finished = train(cwd, *tiny_job(*JOB), "run_dir=run", NAN, policy("skip"))
    assert finished.code == 0, finished.err
    return finished, cwd / "run"


def test_the_console_says_it_in_one_line(skipped: tuple[Finished, Path]) -> None:
    lines = [line for line in skipped[0].out.splitlines() if "not finite" in line]
    assert lines == [
        f"step {STRUCK}: non-finite gradient (nan) on samples {SAMPLES[0]} to {SAMPLES[1]}; "
        "worst block 1 attn_out (0.0977 % not finite); skipped the step (1 in a row)"
    ]


def test_the_events_file_says_it_for_programs(skipped: tuple[Finished, Path]) -> None:
    (event,) = map(json.loads, (skipped[1] / "events.jsonl").read_text().splitlines())
    loss = event.pop("loss")
    assert loss == pytest.approx(scalars(skipped[1], "train/loss")[STRUCK - 1], rel=1e-6), (
        "mean over the step's batches"
    )
    assert event == {
        "step": STRUCK,
        "alarms": ["non-finite gradient"],
        "score": None,
        "grad_norm": None,
        "samples": SAMPLES,
        "block": 1,
        "kind": "attn_out",
        "finding": "0.0977 % not finite",  # one of 32 x 32
        "policy": "skip",
        "done": "skipped the step (1 in a row)",
    }


def test_tensorboard_has_its_text_and_its_figures(skipped: tuple[Finished, Path]) -> None:
    log = events(skipped[1])
    (text,) = log.Tensors("divergence/event/text_summary")
    assert text.step == STRUCK - 1
    assert text.tensor_proto.string_val[0].decode() in skipped[0].out
    assert [(event.step, event.value) for event in log.Scalars("divergence/score")] == [(STRUCK - 1, float("inf"))]
    assert log.Scalars("divergence/loss")[0].value == pytest.approx(log.Scalars("train/loss")[STRUCK - 1].value)


def test_the_flight_recorder_has_the_step_and_its_tokens(skipped: tuple[Finished, Path]) -> None:
    (path,) = (skipped[1] / "flight_recorder").iterdir()
    assert path.name == f"step_{STRUCK}_rank_0.pt"
    record = load(path)
    assert record["reason"] in skipped[0].out
    assert (record["step"], record["samples"]) == (STRUCK, SAMPLES)
    assert torch.equal(
        torch.cat([batch["tokens"] for batch in record["batches"]]), torch.from_numpy(tokens_of(SAMPLES))
    )
    assert [step["step"] for step in record["steps"]] == list(range(1, STRUCK + 1))
    means = [float(np.mean(step["losses"])) for step in record["steps"]]
    assert means == pytest.approx(list(scalars(skipped[1], "train/loss").values())[:STRUCK])
    norms = list(scalars(skipped[1], "optim/grad_norm").values())
    assert [step["grad_norm"] for step in record["steps"][:-1]] == pytest.approx(norms[: STRUCK - 1], rel=1e-5)
    shares = dict(zip(map(tuple, record["groups"]), record["steps"][-1]["nonfinite"], strict=True))
    assert {group: share for group, share in shares.items() if share} == {(1, "attn_out"): 1 / 32**2}


def tokens_of(samples: list[int]) -> np.ndarray:
    """The windows of these global sample numbers, [samples, 33], straight from the shards."""
    from datamodules.order import sample_indices
    from datamodules.shards import open_split

    (folder,) = corpus_root().iterdir()
    split = open_split(folder, "train")
    numbers = np.arange(samples[0], samples[1] + 1)
    return split.read(sample_indices(numbers, split.num_samples(32), seed=0), 32)


def test_a_skipped_step_leaves_weights_and_moments_and_the_clock_goes_on(skipped: tuple[Finished, Path]) -> None:
    last = load(skipped[1] / "checkpoints/last.ckpt")
    steps = {int(state["step"]) for state in last["optimizer_states"][0]["state"].values()}
    assert steps == {STEPS - 1}
    assert last["global_step"] == last["lr_schedulers"][0]["last_epoch"] == STEPS
    assert last["PythonStdlib"]["samples"] == STEPS * ACCUMULATE * BATCH_SIZE
    assert np.isfinite(list(scalars(skipped[1], "train/loss").values())).all()


def test_without_a_fault_the_watch_changes_nothing(tmp_path: Path) -> None:
    watched = run(tmp_path, "watched", *JOB, policy("rollback"))
    off = ["callbacks.divergence=null", "callbacks.flight_recorder=null"]
    unwatched = run(tmp_path, "unwatched", *JOB, *off)
    for tag in ("train/loss", "optim/grad_norm", "optim/lr"):
        assert scalars(watched, tag) == scalars(unwatched, tag)
    ours, theirs = (load(path / "checkpoints/last.ckpt")["state_dict"] for path in (watched, unwatched))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert not (watched / "events.jsonl").exists()
    assert not (watched / "flight_recorder").exists()


def test_stop_exits_with_3_and_leaves_a_report(tmp_path: Path) -> None:
    finished = train(tmp_path, *tiny_job(*JOB), "run_dir=run", NAN, policy("stop"))
    assert finished.code == 3
    assert finished.err == ""
    assert finished.out.splitlines()[-1] == "Stopped. How to go on: run/divergence.md"
    report = (tmp_path / "run/divergence.md").read_text()
    assert report.startswith(f"# Stopped before the update of step {STRUCK}\n")
    assert "stopped, as an alarm under policy=stop" in report
    rows = {row[0]: row[-1] for row in re.findall(r"^\| ([\w ]+) \| (.*) \| (.*) \| (.*) % \|$", report, re.MULTILINE)}
    assert rows["block 1 attn_out"] == "0.0977"
    assert {share for group, share in rows.items() if group != "block 1 attn_out"} == {"0"}
    assert f"python -m tools.replay run step={STRUCK}" in report
    assert not (tmp_path / "run/summary.json").exists()


def test_warn_goes_on_dies_and_does_not_say_so_at_every_step(tmp_path: Path) -> None:
    sample = "callbacks.text_sample={_target_: callbacks.console.text_sample.TextSample, prompt: a, num_tokens: 1}"
    long = ("trainer.max_steps=50", "trainer.log_every_n_steps=1")
    finished = train(tmp_path, *tiny_job(*JOB), "run_dir=run", NAN, sample, *long)
    assert finished.code == 3, finished.err
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert steps == [STRUCK, STRUCK + 1, STRUCK + 22, STRUCK + 43], "the second is of another kind: the loss"
    assert np.isnan(scalars(tmp_path / "run", "train/loss")[49])
    (said,) = events(tmp_path / "run").Tensors("sample/text_summary")
    assert b"no text: the model's output is not finite" in said.tensor_proto.string_val[0]


class Fail(L.Callback):
    """The process dies on an exception after the backward pass of a batch."""

    def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step == STRUCK - 1:
            raise RuntimeError("out of luck")


def test_an_exception_is_recorded_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of luck"):
        train(
            tmp_path,
            *tiny_job(*JOB),
            "run_dir=run",
            f"+callbacks.fail._target_={__name__}.Fail",
        )
    (path,) = (tmp_path / "run/flight_recorder").iterdir()
    record = load(path)
    assert (record["reason"], record["step"]) == ("RuntimeError: out of luck", STRUCK)
    assert [step["step"] for step in record["steps"]] == list(range(1, STRUCK))
    assert torch.equal(record["batches"][0]["tokens"], torch.from_numpy(tokens_of(SAMPLES))[:BATCH_SIZE])


class Lost:
    """A tensor on a device that answers no more."""

    def cpu(self) -> torch.Tensor:
        raise RuntimeError("CUDA error: device-side assert triggered\nFor debugging consider ...")


class LoseTheDevice(L.Callback):
    """The batch that is recorded is out of reach when the process dies."""

    def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        (recorder,) = (c for c in trainer.callbacks if isinstance(c, FlightRecorder))  # type: ignore[attr-defined]
        recorder.batches = [{"tokens": Lost()}]  # type: ignore[list-item]
        raise RuntimeError("out of luck")


def test_a_record_that_cannot_be_written_does_not_hide_the_exception(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = [FlightRecorder(str(tmp_path)), LoseTheDevice()]
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(tmp_path, make_module(), tokens(2, 9), callbacks=callbacks, max_steps=1)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "The flight recorder wrote nothing: RuntimeError: CUDA error: device-side assert triggered"
    )


@pytest.mark.parametrize("callback", [Divergence, FlightRecorder])
def test_a_precision_that_scales_the_loss_is_refused(callback: Any, tmp_path: Path) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    expected = r"trainer.precision='16-mixed' .*\(bf16-mixed, 32-true\), or callbacks.divergence=null"
    with pytest.raises(ConfigError, match=expected):
        fit(tmp_path, make_module(), tokens(2, 9), callbacks=[callback(str(tmp_path))], plugins=plugin, max_steps=1)


def test_a_run_with_a_scaled_loss_trains_without_those_it_is_refused_for(tmp_path: Path) -> None:
    plugin = "{_target_: lightning.pytorch.plugins.MixedPrecision, precision: 16-mixed, device: cpu}"
    scaled = [*tiny_job(*JOB), "trainer.precision=null", f"trainer.plugins=[{plugin}]"]
    finished = train(tmp_path, *scaled)
    assert finished.code == 2
    assert finished.err.startswith("Error: trainer.precision='16-mixed' is not valid: expected one that does not scale")
    assert train(tmp_path, *scaled, *re.findall(r"callbacks\.\w+=null", finished.err)).code == 0


def test_a_bad_batch_names_the_group_that_it_hurt_most(tmp_path: Path) -> None:
    bad = "+callbacks.fault={_target_: tests.support.sabotage.BadBatch, first: 55}"
    long = ["trainer.max_steps=56", "trainer.val_check_interval=56", "optim.lr=1e-2"]
    folder = run(tmp_path, "run", "experiment=dense_prenorm", *long, bad, policy("skip"))
    (event,) = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    assert (event["step"], event["alarms"][0]) == (55, "loss spike")
    assert event["score"] > 7
    record: Any = load(folder / "flight_recorder/step_55_rank_0.pt")
    logs = np.log([step["norms"] for step in record["steps"][:-1]])
    usual = logs[0]
    for log in logs:
        usual = 0.95 * usual + 0.05 * log
    ratios = record["steps"][-1]["norms"] / np.exp(usual)
    assert [event["block"], event["kind"]] == record["groups"][int(ratios.argmax())]
    assert f"{ratios.max():.3g} x its usual" in event["finding"]
