"""The command: the recorded step comes out again as it was, and what came from elsewhere does not."""

import contextlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision
from omegaconf import OmegaConf
from torch import Tensor

from core.errors import UserError
from lightning_modules.transformer import Transformer
from tests.support.models import tiny_config
from tests.support.runs import load, run
from tools import replay

STEPS = ["trainer.max_steps=50", "trainer.accumulate_grad_batches=2"]
STEPS += ["trainer.val_check_interval=100", "callbacks.last_checkpoint.every_n_train_steps=30"]
MIXTURE = ["experiment=moe_spannorm", "model.moe.jitter=0.3"]
BFLOAT16 = ["experiment=dense_prenorm", "trainer.precision=bf16-mixed"]
APART = ["experiment=dense_prenorm", "data.document_mask=true"]
SKIP = "callbacks.divergence.policy=skip"
SENSITIVE = "callbacks.divergence.loss_threshold=4"


class LeaveAfter(L.Callback):
    """The process dies, so that its newest checkpoint is older than the step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("left")


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    mine = [
        "tests.tools.test_replay.LeaveAfter",
        *(f"tests.support.sabotage.{name}" for name in ("BadBatch", "NaNGradient")),
    ]
    monkeypatch.setattr("sys.argv", ["replay", *arguments, f"allow={','.join(mine)}"])
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # which the command sets, for good, in its process
    with contextlib.suppress(SystemExit):
        replay.cli.run(replay.main)
    return capsys.readouterr()


def fault(name: str, first: int) -> str:
    return f"+callbacks.{name}={{_target_: tests.support.sabotage.{name}, first: {first}}}"


@pytest.mark.parametrize("model", [MIXTURE, BFLOAT16, APART], ids=["mixture", "bfloat16", "documents apart"])
def test_a_bad_batch_comes_out_again(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is in the tokens; the run goes from the checkpoint of step 30, past a step that was skipped."""
    interrupt = "+callbacks.interrupt={_target_: tests.tools.test_replay.LeaveAfter, step: 47}"
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="left"):
        run(
            tmp_path, "run", *model, *STEPS, SKIP, SENSITIVE, fault("NaNGradient", 40), fault("BadBatch", 45), interrupt
        )
    before = sorted(path for path in folder.rglob("*"))
    out, _ = call(monkeypatch, capsys, str(folder), "step=45")
    assert f"Step 45 of {folder}, samples {44 * 8} to {45 * 8 - 1}." in out
    assert "step 45: loss spike" in out
    assert "checkpoints/last.ckpt, 14 steps to catch up with." in out
    rows = re.findall(r"^ +(\d) +\S+ +\S+ +\S+ +\S+ +\S+ +\S+ +0 %", out, re.MULTILINE)
    assert rows == ["1", "2"]
    record = load(folder / "flight_recorder/step_45_rank_0.pt")
    assert ("positions" in record["batches"][0]) == (model is APART)
    assert re.search(r"Loss (\S+), gradient norm (\S+); recorded \1 and \2: the same\.$", out.rstrip()), "to each digit"
    assert sorted(path for path in folder.rglob("*")) == before, "it writes nothing"


def test_a_gradient_that_was_spoilt_from_outside_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path, "run", *MIXTURE, *STEPS, SKIP, fault("NaNGradient", 5), "trainer.max_steps=6")
    out, _ = call(monkeypatch, capsys, str(folder))
    assert "From the beginning, 4 steps to catch up with." in out
    assert re.search(r"^ +1 .* 0\.0977 % *$", out, re.MULTILINE), "one of 32 x 32 entries of attention's output matrix"
    assert re.search(r"Loss ([\d.]+), gradient norm [\d.]+; recorded \1 and nan: not the same, so look beyond", out)


def test_what_only_some_processes_recorded_is_said_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two processes' records, one of which had a batch more, and of three, of which one left none."""
    folder = run(tmp_path, "run", *MIXTURE, *STEPS, SKIP, fault("NaNGradient", 5), "trainer.max_steps=6")
    path = folder / "flight_recorder/step_5_rank_0.pt"
    record = load(path)
    for world_size in (2, 3):
        torch.save({**record, "world_size": world_size}, path)
        other = {**record, "world_size": world_size, "batches": record["batches"][:1], "steps": []}
        torch.save(other, path.with_name("step_5_rank_1.pt"))
        out, err = call(monkeypatch, capsys, str(folder))
        assert f"Of {world_size} processes 2 left a record; 1 batches are in all of them." in out
        assert re.search(r"Loss [\d.]+, gradient norm [\d.]+; recorded were none\.$", out.rstrip())
        assert "Traceback" not in err


def test_a_step_after_a_rollback_comes_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint of step 27 lies between the snapshot of step 20 and the rollback of step 29."""
    options = "callbacks.divergence.policy_options={every: 10, margin: 5, patience: 2, lr_factor: 1.0}"
    cause = "+callbacks.cause={_target_: tests.support.sabotage.NaNGradient, first: 28, num_steps: 2}"
    leave = "+callbacks.leave={_target_: tests.tools.test_replay.LeaveAfter, step: 49}"
    overrides = ["callbacks.divergence.policy=rollback", options, cause, fault("BadBatch", 49), leave]
    with pytest.raises(RuntimeError, match="left"):
        run(tmp_path, "run", *STEPS, *overrides, "callbacks.last_checkpoint.every_n_train_steps=27")
    assert load(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 27
    out, _ = call(monkeypatch, capsys, str(tmp_path / "run"), "step=49")
    assert "From the beginning, 48 steps to catch up with." in out
    assert out.rstrip().endswith(": the same.")


@pytest.mark.parametrize(
    ("step", "usable"), [(19, 18), (20, 10), (25, 24), (35, 10)], ids=["of it", "after it", "later", "after both"]
)
def test_checkpoints_between_a_snapshot_and_its_rollback_are_passed_over(
    tmp_path: Path, step: int, usable: int
) -> None:
    """Rolled back at step 19 to 10, and at step 34 again."""
    (tmp_path / "checkpoints").mkdir()
    for at in (5, 10, 11, 18, 24, 33):
        torch.save({"global_step": at}, tmp_path / f"checkpoints/step={at}.ckpt")
    done = {17: "skipped the step", 19: "rolled back to step 10, learning rate x 0.5", 34: "rolled back to step 10"}
    lines = [json.dumps({"step": at, "done": what}) + "\n" for at, what in done.items()]
    (tmp_path / "events.jsonl").write_text("".join(lines))
    assert replay.checkpoint_before(tmp_path, step) == (tmp_path / f"checkpoints/step={usable}.ckpt", usable)


def test_whether_a_callback_steers_is_a_matter_of_its_class() -> None:
    """Not of the name that it goes by: a run from elsewhere may call a callback that writes files `random_state`."""
    callbacks = {
        "random_state": "lightning.pytorch.callbacks.ModelCheckpoint",
        "divergence": "callbacks.divergence.flight_recorder.FlightRecorder",
        "other": "callbacks.checkpointing.random_state.RandomState",
        "mine": "my_file.MyCallback",
    }
    nodes = OmegaConf.create({name: {"_target_": target} for name, target in callbacks.items()})
    assert [name for name, node in nodes.items() if replay.steers(node)] == ["other", "mine"]
    for odd in ("x", 5, OmegaConf.create({"x": 1}), OmegaConf.create(["x"])):
        assert not replay.steers(odd), "what names no class"


@pytest.mark.parametrize("plugins", [None, "16", 5, [], [None], ["x"], [{"x": 1}]])
def test_of_the_plugins_those_of_precision_are_kept(plugins: Any) -> None:
    """The step comes out again in the precision that it had; what saves or starts processes is the replay's own."""
    half = {"_target_": "lightning.pytorch.plugins.HalfPrecision", "precision": "bf16-true"}
    saving = {"_target_": "core.checkpoint.CheckpointIO"}
    config = OmegaConf.create({"trainer": {"plugins": [saving, half, "x", None]}})
    (kept,) = replay.precision_plugins(config)
    assert isinstance(kept, HalfPrecision)
    assert kept.precision == "bf16-true"
    assert replay.precision_plugins(OmegaConf.create({"trainer": {"plugins": plugins}})) == []


@pytest.mark.parametrize(
    ("batches", "reason"),
    [
        ([[]], "have recorded a batch"),
        ([[torch.tensor([[0, 4]])]], "in the model's vocabulary"),
        ([[torch.tensor([[-1, 0]])]], "in the model's vocabulary"),
        ([[torch.zeros(0, 2, dtype=torch.int64)]], "in the model's vocabulary"),
        ([[torch.zeros(5, dtype=torch.int64)]], "in the model's vocabulary"),
        ([[torch.zeros(2, 5)]], "in the model's vocabulary"),
        ([[torch.tensor([[0, 1]])], [torch.tensor([[0, 1, 2]])]], "do not fit each other"),
    ],
)
def test_recorded_batches_that_the_model_cannot_take_are_refused(batches: list[list[Tensor]], reason: str) -> None:
    records = [
        {"step": 3, "world_size": len(batches), "batches": [{"tokens": tokens} for tokens in of_rank], "steps": []}
        for of_rank in batches
    ]
    module = SimpleNamespace(device="cpu", model=Transformer(tiny_config(), 4))
    with pytest.raises(UserError, match=reason):
        replay.report(module, records)


def test_a_run_without_a_record_or_that_step_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = call(monkeypatch, capsys, str(tmp_path))
    assert err == f"Error: RUN='{tmp_path}' is not valid: expected a run with a step in flight_recorder/\n"
    (tmp_path / "flight_recorder").mkdir()
    (tmp_path / "flight_recorder/step_7_rank_0.pt").touch()
    _, err = call(monkeypatch, capsys, str(tmp_path), "step=8")
    assert err == "Error: step=8 is not valid: expected one of 7\n"
    _, err = call(monkeypatch, capsys, str(tmp_path), "step=0")  # not the first one, as without step
    assert err == "Error: step=0 is not valid: expected one of 7\n"
