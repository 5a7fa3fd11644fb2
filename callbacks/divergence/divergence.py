"""Sees a run leave its course, and does something about it before the weights move."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from callbacks.divergence.detectors import Detectors
from callbacks.divergence.divergence_report import write_report
from callbacks.divergence.event_log import EventLog
from callbacks.divergence.loss_scaling import refuse_loss_scaling
from callbacks.divergence.policies.base import GiveUp, Step
from callbacks.divergence.policies.registry import POLICIES
from callbacks.divergence.samples import samples_of_step
from callbacks.divergence.step_override import StepOverride
from callbacks.divergence.worst_group import GroupHistory, describe
from callbacks.protocols import RecordsEvents
from callbacks.statistics import add_to_transfer, gradient_statistics
from core.cli import RunDiverged
from core.errors import lookup, require
from core.options import check_arguments
from core.precision import at_least_fp32
from core.printable import printable
from core.steps import completes_step

CARRIED = "divergence/loss"


class Divergence(L.Callback):
    """Holds loss and gradient norm of each step against those before (callbacks/divergence/detectors.py), and lets a
    policy act on what it finds (callbacks/divergence/policies). The whole story is in docs/recovery.md.

    Every event is one line on the console and one in RUN/events.jsonl; in TensorBoard, at the steps with events only:

    | key | what |
    |---|---|
    | divergence/event | text: the line |
    | divergence/score | z-score of the gravest alarm; infinite for what is no number |
    | divergence/loss | nats per token, auxiliary losses included, over all batches and processes of the step |
    | divergence/grad_norm | l2 norm over all parameters, before clipping |

    Args:
        run_dir: the run's folder.
        policy: what is done about an alarm: warn, skip, zclip, adagc, rollback or stop.
        policy_options: arguments of the policy.
        loss_threshold: z-score of a loss spike.
        gradient_threshold: z-score of a gradient spike.
        climb_threshold: z-score of a loss level that has risen.

    Raises:
        ConfigError: no such policy, an option that it does not take, a precision that scales the loss, or
            policy=rollback without a callback that keeps its snapshots over a stop.
        RunDiverged: the policy sees no way to go on; train.py then exits with 3.
    """

    def __init__(
        self,
        run_dir: str,
        policy: str = "warn",
        policy_options: dict[str, Any] | None = None,
        loss_threshold: float = 7.0,
        gradient_threshold: float = 8.0,
        climb_threshold: float = 6.0,
    ) -> None:
        options = policy_options or {}
        scheme = lookup("callbacks.divergence.policy", policy, POLICIES)
        check_arguments("callbacks.divergence.policy_options", scheme, options)
        thresholds = {"loss": loss_threshold, "gradient": gradient_threshold, "climb": climb_threshold}
        for name, value in thresholds.items():
            require(value > 0, f"callbacks.divergence.{name}_threshold", value, "a number > 0")
        self.run_dir, self.policy_name, self.policy = run_dir, policy, scheme(**options)
        self.detectors = Detectors(loss_threshold, gradient_threshold, climb_threshold)
        self.groups, self.events = GroupHistory(), EventLog(run_dir)
        self._step_override: StepOverride | None = None
        self._last_batch = False
        self._loss: Tensor | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        refuse_loss_scaling(trainer)
        self.policy.check_run(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step_override = StepOverride(trainer.optimizers[0])

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._last_batch = completes_step(trainer, batch_idx)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        loss = at_least_fp32(loss.detach())  # Lightning has divided it by the number of batches of a step
        self._loss = loss if self._loss is None else self._loss + loss
        if self._last_batch:
            add_to_transfer(pl_module, CARRIED, self._loss[None])
            self._loss = None

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert self._step_override is not None
        statistics = gradient_statistics(trainer, pl_module)
        # The norm too, although all should have the same: a single process in trouble must not decide alone.
        loss, norm = _reduce(trainer, [*statistics.carried[CARRIED], statistics.total_norm], "mean")
        before = self.detectors.state_dict()
        alarms = self.detectors.update(loss, norm)
        if alarms:
            worst = _reduce(trainer, [*statistics.norms, *statistics.nonfinite], "max")
            half = len(statistics.groups)
            statistics = statistics._replace(norms=worst[:half], nonfinite=worst[half:])
        step = Step(
            trainer=trainer,
            pl_module=pl_module,
            step_override=self._step_override,
            number=trainer.global_step + 1,
            loss=loss,
            statistics=statistics._replace(total_norm=norm),
            alarms=alarms,
            detectors=self.detectors,
            detectors_before=before,
        )
        try:
            done = self.policy.act(step)
        except GiveUp as reason:
            line = self._report(step, f"stopped, as {reason}")
            if trainer.is_global_zero:
                report = write_report(self.run_dir, step, line, self.groups)
                print(f"Stopped. How to go on: {printable(report, limit=None)}", flush=True)
            raise RunDiverged(step.number, line) from None
        if done is not None:
            self._report(step, done)
        if not alarms:
            self.groups.update(statistics)

    def _report(self, step: Step, done: str) -> str:
        """Note the event everywhere, and return its line."""
        samples = samples_of_step(step.trainer)
        group, finding = self.groups.worst(step.statistics)
        seen = "; ".join(str(alarm) for alarm in step.alarms)
        where = f"samples {samples[0]} to {samples[1]}" if samples else "its batch"
        line = f"step {step.number}: {seen} on {where}; worst {describe(group)} ({finding}); {done}"
        event: dict[str, Any] = {
            "step": step.number,
            "alarms": [alarm.kind for alarm in step.alarms],
            "score": step.alarms[0].score,
            "loss": step.loss,
            "grad_norm": step.statistics.total_norm,
            "samples": samples,
            "block": group.block,
            "kind": group.kind,
            "finding": finding,
            "policy": self.policy_name,
            "done": done,
        }
        scalars = {f"divergence/{key}": event[key] for key in ("score", "loss", "grad_norm")}
        self.events.write(step.trainer, line, event, scalars)
        for callback in step.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RecordsEvents):
                callback.record_event(step.trainer, line)
        return line

    def state_dict(self) -> dict[str, Any]:
        return {
            "detectors": self.detectors.state_dict(),
            "groups": self.groups.state_dict(),
            "policy": {self.policy_name: self.policy.state_dict()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.detectors.load_state_dict(state["detectors"])
        self.groups.load_state_dict(state["groups"])
        if self.policy_name in state["policy"]:  # a run may go on under another policy
            self.policy.load_state_dict(state["policy"][self.policy_name])


def _reduce(trainer: L.Trainer, values: list[float], operation: str) -> list[float]:
    """Return the values reduced over all processes, each by itself."""
    if trainer.world_size == 1:
        return values
    device = trainer.strategy.root_device
    reduced: Tensor = trainer.strategy.reduce(
        torch.tensor(values, dtype=torch.float32, device=device), reduce_op=operation
    )
    return reduced.tolist()
