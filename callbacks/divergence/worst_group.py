"""Finds the block and kind of parameter that an alarm is about."""

import math
from typing import Any

from callbacks.statistics import GradientStatistics, Group


class GroupHistory:
    """Knows what the gradient norm of each group usually is: a moving average of its logarithm.

    Args:
        decay: of the average, per step.
    """

    def __init__(self, decay: float = 0.95) -> None:
        self.decay = decay
        self.usual: list[float] = []

    def update(self, statistics: GradientStatistics) -> None:
        """Take in the norms of a healthy step."""
        logs = [math.log(max(norm, 1e-30)) for norm in statistics.norms]
        if len(self.usual) != len(logs):
            self.usual = logs
        self.usual = [self.decay * old + (1 - self.decay) * new for old, new in zip(self.usual, logs, strict=True)]

    def worst(self, statistics: GradientStatistics) -> tuple[Group, str]:
        """Return the group that is worst, and the finding in words.

        It is the one with the largest share of entries that are no number, or else with the largest norm as against its
        usual one.
        """
        share = max(statistics.nonfinite)
        if share > 0:
            group = statistics.groups[statistics.nonfinite.index(share)]
            return group, f"{100 * share:.3g} % not finite"
        usual = self.usual or [0.0] * len(statistics.norms)
        ratios = [norm / math.exp(log) for norm, log in zip(statistics.norms, usual, strict=True)]
        ratio = max(ratios)
        index = ratios.index(ratio)
        compared = f"{ratio:.3g} x its usual" if self.usual else "no history"
        return statistics.groups[index], f"gradient norm {statistics.norms[index]:.3g}, {compared}"

    def state_dict(self) -> dict[str, Any]:
        return {"usual": list(self.usual)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.usual = list(state["usual"])


def describe(group: Group) -> str:
    """Return `block 3 ffn_down`, or `embedding` outside of the blocks."""
    return f"block {group.block} {group.kind}" if group.block else group.kind
