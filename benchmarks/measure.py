"""Holds what every benchmark shares: taking turns, ratios within a round, and the machine's name."""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from core.errors import require

Step = Callable[[], Any]


def check_counts(config: Any, **least: int) -> None:
    """Raise ConfigError unless each of these fields of a benchmark's settings is at least so large; null passes."""
    for name, number in least.items():
        value = getattr(config, name)
        for one in value if isinstance(value, tuple) else (value,):
            require(one is None or one >= number, name, one, f"an integer >= {number}")


def take_turns(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds that each says it took, by contender and round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, contender in contenders.items():
            seconds[name].append(contender())
    return {name: values[1:] for name, values in seconds.items()}


def timed(step: Step, device: str = "cpu") -> Callable[[], float]:
    """Return the step, which then says how many seconds it took."""

    def run() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return run


def ratio(seconds: list[float], base: list[float]) -> float:
    """Return the median of the ratios within each round, so that the machine's drift hits both alike."""
    return statistics.median(ratios(seconds, base))


def ratios(seconds: list[float], base: list[float]) -> list[float]:
    """Return those of each round."""
    return [a / b for a, b in zip(seconds, base, strict=True)]


def interval(of_rounds: list[float]) -> tuple[float, float]:
    """Return the ends of an interval that holds the median of what such ratios are drawn from, 95 times in 100 or more.

    They are two of the ratios themselves, by the binomial distribution of how many lie below the median; of fewer than
    six rounds, the least and the largest, which hold it less often.
    """
    ordered, left_out = sorted(of_rounds), 0  # at either end
    while _at_most(left_out, len(of_rounds)) <= 0.025:
        left_out += 1
    left_out = max(0, left_out - 1)
    return ordered[left_out], ordered[-1 - left_out]


def _at_most(heads: int, coins: int) -> float:
    """Return the probability of so many heads or fewer."""
    return sum(math.comb(coins, number) for number in range(heads + 1)) / 2**coins


def judged(met: bool) -> str:
    """Return how a goal came out, for a report."""
    return "**met**" if met else "**missed**"


def report(head: str, columns: str, rows: Iterable[Any], verdict: Callable[[list[Any]], str], output: Path) -> None:
    """Print a table row by row as it is measured, with what is before and behind it, and write all of it to a file."""
    print(head)
    print(columns)
    found = []
    for row in rows:
        found.append(row)
        print(row, flush=True)
    judgement = verdict(found)
    print(f"\n{judgement}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join([head, columns, *map(str, found), "", judgement]) + "\n")


def machine_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = models[0].partition(":")[2].strip() if models else platform.processor()
    return f"{name}, {os.cpu_count()} cores"


def machine(device: str) -> str:
    """Return its name, and what of its state a figure depends on."""
    if device == "cuda":
        return f"{machine_name(device)}, CUDA {torch.version.cuda}"
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return f"{machine_name(device)}, {torch.get_num_threads()} threads used, load before {load}"
