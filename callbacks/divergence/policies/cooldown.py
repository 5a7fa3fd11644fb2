"""Cuts the learning rate after a rollback, so deep and for so long."""

from typing import Any


class Cooldown:
    """Cuts the learning rate, after the first rollback to `factor` times the scheduled one for `num_steps` steps.

    If trouble is back before the run was healthy for as long as the cut had lasted, the cut is repeated, deeper
    (`factor` once more) and twice as long. So a bad batch costs little, and a learning rate that the model cannot bear
    is brought down step by step.

    Args:
        factor: of the learning rate.
        num_steps: that the first cut lasts.
    """

    def __init__(self, factor: float, num_steps: int) -> None:
        self.factor, self.num_steps = factor, num_steps
        self.strikes, self.first, self.last = 0, 0, -1  # the cut covers steps first to last

    def start(self, step: int) -> None:
        """Begin a cut: a rollback has come before this step's update."""
        length = self.last - self.first + 1
        self.strikes = 1 if step > self.last + length else self.strikes + 1
        self.first = step + 1
        self.last = step + self.num_steps * 2 ** (self.strikes - 1)

    def factor_at(self, step: int) -> float:
        """Return the share of the scheduled learning rate that this step has."""
        return self.factor**self.strikes if self.first <= step <= self.last else 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"strikes": self.strikes, "first": self.first, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.strikes, self.first, self.last = state["strikes"], state["first"], state["last"]
