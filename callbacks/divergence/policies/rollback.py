"""Take the run back to where it was well, and let it go on past the data that hurt it."""

from typing import Any

import lightning as L

from callbacks.divergence.detectors import CLIMB, PLATEAU
from callbacks.divergence.policies.base import GiveUp, Policy, Step
from callbacks.divergence.policies.cooldown import Cooldown
from callbacks.divergence.policies.snapshot import Snapshot
from callbacks.divergence.policies.snapshot_file import SnapshotFile
from callbacks.protocols import KeepsBeside
from callbacks.statistics import forget_update
from core.compat import averaged_weights
from core.errors import InvalidValue, require

FIELD = "callbacks.divergence.policy_options"


class Rollback(Policy):
    """An alarm skips its step, which is enough where the data are bad. Where alarms go on although the weights stand
    still, or the loss climbs or stays up, the weights are bad: they, averages of them, the optimizer's state and the
    random numbers are taken back to a snapshot, and the learning rate is cut for a while.

    The step counter and the data go on: the run is past the data that hurt it, and schedules, positions and logs stay
    what arithmetic says they are. Snapshots lie beside last.ckpt (SnapshotFile); a run resumed without them takes its
    first one at the first step without an alarm.

    Args:
        every: steps between two snapshots.
        margin: steps that a snapshot must be older than the trouble, which begins before it shows.
        patience: alarms in a row at which the run is taken back; those before skip their step.
        lr_factor: of the learning rate after a rollback; see Cooldown.
        cooldown: steps that the first cut lasts.
        max_in_a_row: rollbacks without a recovery in between; one more and the run stops.
    """

    def __init__(
        self,
        every: int = 50,
        margin: int = 10,
        patience: int = 8,
        lr_factor: float = 0.5,
        cooldown: int = 100,
        max_in_a_row: int = 5,
    ) -> None:
        require(margin >= 0, f"{FIELD}.margin", margin, "an integer >= 0")
        require(every >= max(margin, 1), f"{FIELD}.every", every, f"an integer >= margin={margin}, and >= 1")
        require(0 < lr_factor <= 1, f"{FIELD}.lr_factor", lr_factor, "a number in (0, 1]")
        for name, value in (("patience", patience), ("cooldown", cooldown), ("max_in_a_row", max_in_a_row)):
            require(value >= 1, f"{FIELD}.{name}", value, "an integer >= 1")
        self.every, self.margin, self.patience, self.max_in_a_row = every, margin, patience, max_in_a_row
        self.cooldown = Cooldown(lr_factor, cooldown)
        self.snapshots: list[Snapshot] = []
        self.file: SnapshotFile | None = None
        self.alarms_in_a_row, self.onset, self.last_alarm, self.due = 0, 0, -margin, 0

    def check_run(self, trainer: L.Trainer) -> None:
        """Refuse a run whose checkpoints would be without snapshots: resumed, it could not go back to any."""
        kept = any(isinstance(callback, KeepsBeside) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if not kept and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # nothing is saved in that
            reason = "its snapshots are kept over a stop by callbacks.last_checkpoint, which is off; "
            reason += "turn it on, or choose another policy, as skip"
            raise InvalidValue("callbacks.divergence.policy", "rollback", reason)

    def act(self, step: Step) -> str | None:
        if self.file is None:
            self.file = SnapshotFile(step.trainer, step.detectors, lambda: self.snapshots)
            if step.trainer.ckpt_path is not None:
                self.snapshots = self.file.load(step.detectors_before, self._snapshot_of(step))
        if step.alarms:
            return self._on_alarm(step)
        self.alarms_in_a_row = 0
        due = step.number > self.due and step.number > self.last_alarm + self.margin
        if due:
            self.due = step.number - 1 + self.every - (step.number - 1) % self.every
        if due or not self.snapshots:
            self._take_snapshot(step)
        factor = self.cooldown.factor_at(step.number)
        if factor < 1:
            step.step_override.scale_lr(factor)
        return None

    def _on_alarm(self, step: Step) -> str:
        self.alarms_in_a_row += 1
        self.last_alarm = step.number
        if self.alarms_in_a_row == 1:
            self.onset = step.number
        self.onset = min(self.onset, step.number - max(alarm.age for alarm in step.alarms))
        step.skip()
        weights_are_bad = any(alarm.kind in (CLIMB, PLATEAU) for alarm in step.alarms)
        if self.alarms_in_a_row < self.patience and not weights_are_bad:
            return "skipped the step"
        self.cooldown.start(step.number)
        if self.cooldown.strikes > self.max_in_a_row:
            raise GiveUp(f"{self.max_in_a_row} rollbacks in a row did not help")
        self.alarms_in_a_row = 0
        if not self.snapshots:  # no step without an alarm so far, so that the weights are still those of the start
            self._take_snapshot(step)
        snapshot = self._choose(step.number)
        snapshot.restore(step.pl_module, step.step_override.optimizer, averaged_weights(step.trainer))
        forget_update(step.pl_module)
        step.detectors.load_state_dict(snapshot.detectors)
        factor, last = self.cooldown.factor_at(step.number + 1), self.cooldown.last
        cut = f", learning rate x {factor:g} to step {last}" if factor < 1 else ""
        return f"rolled back to step {snapshot.step}{cut}"

    def _take_snapshot(self, step: Step) -> None:
        """Keep the state after the step before; this step's update is still to come."""
        self.snapshots = [*self.snapshots[-1:], self._snapshot_of(step)]

    def _snapshot_of(self, step: Step) -> Snapshot:
        averages = averaged_weights(step.trainer)
        return Snapshot(step.number - 1, step.pl_module, step.step_override.optimizer, step.detectors_before, averages)

    def _choose(self, now: int) -> Snapshot:
        """Return the newest snapshot that is old enough, unless it has just failed; younger ones are given up."""
        old_enough = [s for s in self.snapshots if s.step <= self.onset - self.margin] or self.snapshots[:1]
        restored_at = old_enough[-1].restored_at
        if len(old_enough) > 1 and restored_at is not None and now <= restored_at + self.margin + self.patience:
            old_enough.pop()
        self.snapshots = old_enough
        old_enough[-1].restored_at = now
        return old_enough[-1]

    def state_dict(self) -> dict[str, Any]:
        names = ("alarms_in_a_row", "onset", "last_alarm", "due")
        return {**{name: getattr(self, name) for name in names}, "cooldown": self.cooldown.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("alarms_in_a_row", "onset", "last_alarm", "due"):
            setattr(self, name, state[name])
        self.cooldown.load_state_dict(state["cooldown"])
