"""Leave out the steps whose batch raises an alarm."""

from typing import Any

from callbacks.detectors import CLIMB, PLATEAU
from callbacks.policies.base import GiveUp, Policy, Step
from core.errors import require


class Skip(Policy):
    """The optimizer does not move on a step that spikes or is not finite: enough for a bad batch, not for bad weights.

    A climb or a plateau is no batch's doing and is only reported: were its step forgotten, the next one would raise the
    same alarm.

    Args:
        max_in_a_row: one more and the run stops: weights that raise alarms on every batch do not heal by waiting.
    """

    def __init__(self, max_in_a_row: int = 10) -> None:
        require(max_in_a_row >= 1, "callbacks.divergence.policy_options.max_in_a_row", max_in_a_row, "an integer >= 1")
        self.max_in_a_row = max_in_a_row
        self.in_a_row = 0

    def act(self, step: Step) -> str | None:
        if all(alarm.kind in (CLIMB, PLATEAU) for alarm in step.alarms):
            self.in_a_row = 0
            return "went on" if step.alarms else None
        if self.in_a_row == self.max_in_a_row:
            raise GiveUp(f"{self.in_a_row} skipped steps in a row did not help")
        self.in_a_row += 1
        step.skip()
        return f"skipped the step ({self.in_a_row} in a row)"

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row = state["in_a_row"]
