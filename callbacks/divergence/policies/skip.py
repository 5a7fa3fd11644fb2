"""Leave out the steps whose batch raises an alarm."""

from typing import Any

from callbacks.divergence.detectors import CLIMB, PLATEAU
from callbacks.divergence.policies.base import GiveUp, Policy, Step
from core.errors import require


class Skip(Policy):
    """Leaves out a step that spikes or is not finite, which is enough for a bad batch and not for bad weights.

    A climb or a plateau is no batch's doing and is only reported: were its step forgotten, the next one would raise the
    same alarm.

    Args:
        max_in_a_row: one more and the run stops: weights that raise alarms on every batch do not heal by waiting.
        max_in_100: likewise, of any 100 steps: data half of which is left out are not what the run was to learn.
    """

    def __init__(self, max_in_a_row: int = 10, max_in_100: int = 30) -> None:
        for name, value in (("max_in_a_row", max_in_a_row), ("max_in_100", max_in_100)):
            require(value >= 1, f"callbacks.divergence.policy_options.{name}", value, "an integer >= 1")
        self.max_in_a_row, self.max_in_100 = max_in_a_row, max_in_100
        self.in_a_row = 0
        self.steps: list[int] = []  # skipped, of the last 100

    def act(self, step: Step) -> str | None:
        if all(alarm.kind in (CLIMB, PLATEAU) for alarm in step.alarms):
            self.in_a_row = 0
            return "went on" if step.alarms else None
        if self.in_a_row == self.max_in_a_row:
            raise GiveUp(f"{self.in_a_row} skipped steps in a row did not help")
        self.steps = [number for number in self.steps if number > step.number - 100]
        if len(self.steps) == self.max_in_100:
            raise GiveUp(f"{self.max_in_100} of the last 100 steps were skipped")
        self.steps.append(step.number)
        self.in_a_row += 1
        step.skip()
        return f"skipped the step ({self.in_a_row} in a row)"

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row, "steps": list(self.steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row, self.steps = state["in_a_row"], list(state["steps"])
