"""Tell from loss and gradient norm, step by step, that a run leaves its course. Pure Python: no torch, no Trainer."""

import itertools
import math
import statistics
from collections import deque
from typing import Any, NamedTuple

NONFINITE_LOSS, NONFINITE_GRADIENT = "non-finite loss", "non-finite gradient"
LOSS_SPIKE, GRADIENT_SPIKE = "loss spike", "gradient spike"
CLIMB, PLATEAU = "slow climb", "dead plateau"


class Alarm(NamedTuple):
    """One reason for concern.

    Attributes:
        kind: one of the names above.
        value: what was seen: a loss in nats per token, or a gradient norm.
        expected: what was usual before; nan: nothing was.
        score: distance between the two in spreads of the usual; infinite for what is no number.
        age: steps that the trouble is older than its alarm, where it takes so many to be sure of it.
    """

    kind: str
    value: float
    expected: float
    score: float
    age: int = 0

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return f"{self.kind} ({self.value})"
        return f"{self.kind} {self.value:.3g} (usual {self.expected:.3g}, z {self.score:.1f})"


class Usual:
    """Knows what a series was like lately: its level, and how far it strays from one value to the next.

    The level is the median of the last few values. The spread is the median absolute difference of successive values,
    scaled to a normal distribution's standard deviation: unlike a deviation from the mean, it does not take the slope
    of a falling loss for noise (von Neumann 1941, with a median in the place of the mean).

    Args:
        floor: least spread, in the unit of the series: nothing is expected to repeat more exactly than that.
        level_window: values that the level is taken over.
        window: values that the spread is taken over.
    """

    def __init__(self, floor: float, level_window: int, window: int = 32) -> None:
        self.values: deque[float] = deque(maxlen=window)
        self.floor, self.level_window = floor, level_window

    @property
    def level(self) -> float:
        return statistics.median(list(self.values)[-self.level_window :])

    @property
    def spread(self) -> float:
        values = list(self.values)
        moves = [abs(after - before) for before, after in itertools.pairwise(values)]
        to_deviation = 1.4826 / math.sqrt(2)  # from a median |difference| of two values to the deviation of one
        return max(to_deviation * statistics.median(moves or [0.0]), self.floor)


class SpikeDetector:
    """Finds a value far above the last ones: a robust z-score over a window, with a floor on the spread.

    Args:
        kind: of its alarms.
        threshold: z-score above which it is a spike.
        floor: least spread, in the unit of the series.
        warm_up: values without which nothing is called usual.
    """

    def __init__(self, kind: str, threshold: float, floor: float, warm_up: int = 10) -> None:
        self.kind, self.threshold, self.warm_up = kind, threshold, warm_up
        self.usual = Usual(floor, level_window=16)

    def update(self, value: float) -> Alarm | None:
        usual, alarm = self.usual, None
        if len(usual.values) >= self.warm_up:
            score = (value - usual.level) / usual.spread
            alarm = Alarm(self.kind, value, usual.level, score) if score > self.threshold else None
        usual.values.append(value)
        return alarm

    def state_dict(self) -> dict[str, Any]:
        return {"values": list(self.usual.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.usual.values.clear()
        self.usual.values.extend(state["values"])


class ClimbDetector:
    """Finds a level that has risen above the best one so far, too slowly for a spike; or that stays up after a spike.

    After a spike the run has `patience` steps to come down again; if it does not, that is a dead plateau. Either way
    the level that was reached is the best one from then on, so that the next alarm means a further climb.

    Args:
        threshold: standard errors of the level above which it has risen.
        margin: and so much, as a fraction of the best level.
        floor: least spread, in the unit of the series.
        patience: steps between a spike and the verdict.
    """

    def __init__(self, threshold: float, margin: float, floor: float, patience: int = 50) -> None:
        self.threshold, self.margin, self.patience = threshold, margin, patience
        self.usual = Usual(floor, level_window=25)
        self.best = math.inf
        self.since_spike = -1  # steps; -1: none to wait for

    def update(self, value: float, spike: bool) -> Alarm | None:
        usual = self.usual
        usual.values.append(value)
        if spike and self.since_spike < 0:
            self.since_spike = 0
        if len(usual.values) < usual.level_window:
            return None
        level = usual.level
        if self.best == math.inf:
            self.best = level
        error = math.sqrt(math.pi / 2 / usual.level_window) * usual.spread  # of a median of that many
        score, risen = (level - self.best) / error, level - self.best > self.margin * abs(self.best)
        if self.since_spike >= 0:
            self.since_spike += 1
            if self.since_spike <= self.patience:
                return None
        kind, age = (CLIMB, usual.level_window) if self.since_spike < 0 else (PLATEAU, self.patience)
        self.since_spike = -1
        alarm = Alarm(kind, level, self.best, score, age) if risen and score > self.threshold else None
        self.best = level if alarm else min(self.best, level)
        return alarm

    def state_dict(self) -> dict[str, Any]:
        return {"values": list(self.usual.values), "best": self.best, "since_spike": self.since_spike}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.usual.values.clear()
        self.usual.values.extend(state["values"])
        self.best, self.since_spike = state["best"], state["since_spike"]


class Detectors:
    """Applies all detectors to the loss and the gradient norm of each step.

    Values that are no number raise an alarm and stay out of the histories.

    Args:
        loss_threshold: z-score of a loss spike.
        gradient_threshold: z-score of a gradient spike, of the norm's logarithm.
        climb_threshold: z-score of a level that has risen.
    """

    def __init__(self, loss_threshold: float, gradient_threshold: float, climb_threshold: float) -> None:
        self.loss = SpikeDetector(LOSS_SPIKE, loss_threshold, floor=0.08)
        self.gradient = SpikeDetector(GRADIENT_SPIKE, gradient_threshold, floor=0.5)
        self.climb = ClimbDetector(climb_threshold, margin=0.1, floor=0.05)

    def update(self, loss: float, gradient_norm: float) -> list[Alarm]:
        """Return the alarms of one step, the gravest first.

        Args:
            loss: nats per token, over all batches and processes of the step.
            gradient_norm: l2 norm before clipping.
        """
        found: list[Alarm | None] = []
        if math.isfinite(loss):
            spike = self.loss.update(loss)
            found += [spike, self.climb.update(loss, spike=spike is not None)]
        else:
            found.append(Alarm(NONFINITE_LOSS, loss, self._level(self.loss), math.inf))
        if math.isfinite(gradient_norm):
            found.append(_of_norms(self.gradient.update(math.log(max(gradient_norm, 1e-30)))))
        else:
            usual = math.exp(self._level(self.gradient))
            found.append(Alarm(NONFINITE_GRADIENT, gradient_norm, usual, math.inf))
        return [alarm for alarm in found if alarm is not None]

    def _level(self, detector: SpikeDetector) -> float:
        return detector.usual.level if detector.usual.values else math.nan

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).state_dict() for name in ("loss", "gradient", "climb")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, of_one in state.items():
            getattr(self, name).load_state_dict(of_one)


def _of_norms(alarm: Alarm | None) -> Alarm | None:
    """Return an alarm about logarithms in terms of the norms."""
    if alarm is None:
        return None
    return alarm._replace(value=math.exp(alarm.value), expected=math.exp(alarm.expected))
