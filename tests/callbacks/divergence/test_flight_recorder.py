"""Which step is in a record: when an exception comes between two, when a step is gone through twice, and the limits."""

import contextlib
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from callbacks.divergence.flight_recorder import FlightRecorder
from tests.support.fitting import fit
from tests.support.models import make_module, tokens
from tests.support.runs import load, scalars, tiny_job, train

NAN = "+callbacks.fault={_target_: tests.support.sabotage.NaNGradient, first: 4}"


class FailAt(L.Callback):
    """Dies in a hook of a step, counted from 1."""

    def __init__(self, hook: str, step: int) -> None:
        setattr(self, hook, self._fail)
        self.step = step

    def _fail(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step + 1 == self.step:
            raise RuntimeError("out of luck")


def record_of(tmp_path: Path, hook: str, step: int, **limits: int) -> dict[str, Any]:
    """Three steps of two batches each, and what is recorded of the failure."""
    batches = [tokens(2, 9) for _ in range(6)]
    callbacks = [FlightRecorder(str(tmp_path), **limits), FailAt(hook, step)]
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(tmp_path, make_module(), *batches, callbacks=callbacks, max_steps=3, accumulate_grad_batches=2)
    (path,) = (tmp_path / "flight_recorder").iterdir()
    record = load(path)
    assert path.name == f"step_{record['step']}_rank_0.pt"
    first = 2 * (record["step"] - 1)
    for batch, given in zip(record["batches"], batches[first:], strict=False):
        assert torch.equal(batch["tokens"], given)
    return record


def test_a_failure_within_a_step_is_that_steps(tmp_path: Path) -> None:
    record = record_of(tmp_path, "on_before_optimizer_step", 2)
    assert (record["step"], record["reason"]) == (2, "RuntimeError: out of luck")
    assert (len(record["batches"]), record["world_size"]) == (2, 1)


def test_a_failure_after_a_step_is_not_the_next_ones(tmp_path: Path) -> None:
    """After step 2's update, before step 3 has a batch."""
    record = record_of(tmp_path, "on_train_batch_end", 3)
    assert (record["step"], record["reason"]) == (2, "after this step, RuntimeError: out of luck")


def test_it_remembers_as_many_steps_as_it_is_told(tmp_path: Path) -> None:
    record = record_of(tmp_path, "on_before_optimizer_step", 3, num_steps=1)
    assert [step["step"] for step in record["steps"]] == [3]


def test_a_step_that_is_gone_through_again_is_recorded_again(tmp_path: Path) -> None:
    """The process died in it; resumed, the gradient of the same step is no number."""
    job = [*tiny_job("experiment=dense_prenorm", "trainer.max_steps=5"), "run_dir=run"]
    job += ["callbacks.last_checkpoint.every_n_train_steps=3", "trainer.val_check_interval=9"]
    fail = f"+callbacks.fail={{_target_: {__name__}.FailAt, hook: on_after_backward, step: 4}}"
    with contextlib.suppress(RuntimeError):
        train(tmp_path, *job, fail)
    path = tmp_path / "run/flight_recorder/step_4_rank_0.pt"
    assert load(path)["reason"] == "RuntimeError: out of luck"
    assert train(tmp_path, *job, NAN, "ckpt_path=last").code == 3
    assert "non-finite gradient" in load(path)["reason"]
    assert load(path)["steps"][-1]["step"] == 4


def test_events_have_a_limit_and_the_exception_has_not(tmp_path: Path) -> None:
    job = [*tiny_job("experiment=dense_prenorm", "trainer.max_steps=9"), "run_dir=run"]
    fault = NAN.replace("}", ", num_steps: 3}")
    fail = f"+callbacks.fail={{_target_: {__name__}.FailAt, hook: on_after_backward, step: 8}}"
    with pytest.raises(RuntimeError, match="out of luck"):
        train(tmp_path, *job, fault, fail, "callbacks.divergence.policy=skip", "callbacks.flight_recorder.max_files=1")
    names = sorted(path.name for path in (tmp_path / "run/flight_recorder").iterdir())
    assert names == ["step_4_rank_0.pt", "step_8_rank_0.pt"]


@pytest.mark.parametrize("policy", ["zclip", "adagc"])
def test_the_norm_that_is_logged_is_that_before_a_policy_clips(policy: str, tmp_path: Path) -> None:
    """A gradient a million times as large, at a step that the policy may clip."""
    options = {"zclip": "{warmup_steps: 2}", "adagc": "{warmup_steps: 1}"}[policy]
    boost = f"+callbacks.boost._target_={__name__}.Boost"
    job = [*tiny_job("experiment=dense_prenorm", "trainer.max_steps=14"), f"callbacks.divergence.policy={policy}"]
    train(tmp_path, *job, "run_dir=run", boost, f"callbacks.divergence.policy_options={options}")
    logged, event = (scalars(tmp_path / "run", tag) for tag in ("optim/grad_norm", "divergence/grad_norm"))
    assert logged[13] == pytest.approx(event[13], rel=1e-5)
    assert logged[13] > 1e4


class Boost(L.Callback):
    """Multiplies the last step's gradient as backward computes it, before any hook."""

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        if trainer.global_step == 13:
            for parameter in pl_module.parameters():
                parameter.register_hook(lambda gradient: 1e6 * gradient)
