"""Say it, and let the run go on."""

import math
from typing import Any

from callbacks.divergence.policies.base import Policy, Step
from core.errors import require


class Warn(Policy):
    """Changes nothing; reports alarms of one kind at most once in `quiet` steps.

    Args:
        quiet: steps.
    """

    def __init__(self, quiet: int = 20) -> None:
        require(quiet >= 0, "callbacks.divergence.policy_options.quiet", quiet, "an integer >= 0")
        self.quiet = quiet
        self.reported: dict[str, int] = {}

    def act(self, step: Step) -> str | None:
        kinds = [alarm.kind for alarm in step.alarms]
        if all(step.number <= self.reported.get(kind, -math.inf) + self.quiet for kind in kinds):
            return None
        self.reported |= dict.fromkeys(kinds, step.number)
        return "went on"

    def state_dict(self) -> dict[str, Any]:
        return {"reported": dict(self.reported)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reported = dict(state["reported"])
