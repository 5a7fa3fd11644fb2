"""Says where a step's time goes: by operator, own time, and how many are called."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

FUSED = "fused by inductor"
GENERATED = ("## Call CompiledFxGraph", "triton_")
"""How names in a profile begin that inductor made up; they differ between contenders, so they count as FUSED."""


class Spending(NamedTuple):
    """Holds what the profiler saw of a step.

    Attributes:
        seconds: own time by operator, most first; the profiler makes small ones slower.
        calls: of operators.
    """

    seconds: dict[str, float]
    calls: int

    @property
    def shares(self) -> dict[str, float]:
        """The parts of all operators' own time, most first."""
        total = sum(self.seconds.values())
        return {name: value / total for name, value in self.seconds.items()}


def spending(step: Callable[[], Any], device: str) -> Spending:
    """Run a step under the profiler.

    Args:
        step: what to run.
        device: "cuda": the time is that of the GPU's kernels; else that of the CPU.
    """
    from torch.profiler import ProfilerActivity, profile  # workers measure what memory they need without torch

    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as run:
        step()
    field = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    spent: Counter[str] = Counter()
    calls = 0
    for event in run.key_averages():
        spent[FUSED if event.key.startswith(GENERATED) else event.key] += getattr(event, field) / 1e6
        calls += event.count
    return Spending(dict(spent.most_common()), calls)


def table(of: Mapping[str, Spending]) -> Iterator[str]:
    """Yield a table of the operators that take most of the time of each."""
    names = {name for spent in of.values() for name in list(spent.seconds)[:8]}
    first = next(iter(of.values())).shares
    yield "| share of operators' own time | " + " | ".join(of) + " |"
    yield "|---|" + "---|" * len(of)
    for name in sorted(names, key=lambda name: -first.get(name, 0)):
        cells = (f"{100 * spent.shares.get(name, 0):.1f} %" for spent in of.values())
        yield f"| `{name[:80]}` | " + " | ".join(cells) + " |"
    yield "| all, ms | " + " | ".join(f"{1e3 * sum(spent.seconds.values()):,.1f}" for spent in of.values()) + " |"
    yield "| operators called | " + " | ".join(f"{spent.calls:,}" for spent in of.values()) + " |"
