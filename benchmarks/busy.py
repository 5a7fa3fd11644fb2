"""Measure the default job's training step on a machine that does something else, too.

    python -m benchmarks.busy                  writes results/busy-cpu.md

Beside it run so many processes that never wait. All ways of waiting take one step each in turn, as in
`benchmarks.compare`; a fair share is what the scheduler would give so many threads among so many processes, of the
speed that two threads have alone.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.contenders import Sizes
from benchmarks.measure import check_counts, judged, machine, report, take_turns
from benchmarks.workers import Contender, Worker, start
from core import cli
from core.idle_threads import SPINS, SPINS_BESIDE_OTHERS

JOB = Sizes(257, 4, 128, 4, 128, 256, 8, num_experts=8)
"""Of experiment=moe_spannorm."""
TOKENS = JOB.batch_size * JOB.seq_len
THREADS = 2
QUIET, BUSY = "two threads, as begun on a quiet machine", "two threads, as begun on a busy one"
WAYS = {QUIET: (THREADS, SPINS), BUSY: (THREADS, SPINS_BESIDE_OTHERS), "one thread": (1, SPINS)}
"""Threads, and how often each looks for work before it sleeps."""
ONE_BESIDE, OF_FAIR_SHARE = 0.62, 0.7
"""What is asked for: of the speed alone with one process beside it, and of the fair share with several."""


@dataclass(frozen=True)
class BusyConfig:
    """Holds the fields that `python -m benchmarks.busy` takes.

    Attributes:
        beside: the numbers of busy processes.
        rounds: the number of rounds, in each of which all ways take a step.
        output: the report.
    """

    beside: tuple[int, ...] = (0, 1, 2, 4, 8)
    rounds: int = 7
    output: Path = Path("results/busy-cpu.md")

    def __post_init__(self) -> None:
        check_counts(self, beside=0, rounds=1)


class Row(NamedTuple):
    """Holds what was measured beside so many busy processes.

    Attributes:
        beside: how many.
        speeds: tokens/s of each way, in WAYS' order.
        wanted: tokens/s that are asked of a run that begins so; None beside nothing.
    """

    beside: int
    speeds: list[float]
    wanted: float | None

    @property
    def met(self) -> bool:
        return self.wanted is None or self.speeds[list(WAYS).index(BUSY)] >= self.wanted

    def __str__(self) -> str:
        goal = "" if self.wanted is None else f"{self.wanted:,.0f}: {judged(self.met)}"
        return f"| {self.beside} | {' | '.join(f'{speed:,.0f}' for speed in self.speeds)} | {goal} |"


HEAD = f"| busy processes | {' | '.join(WAYS)} | asked of the second |\n|---|{'---|' * len(WAYS)}---|"


@contextmanager
def busy(number: int) -> Iterator[None]:
    """Keep so many processes busy meanwhile."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wanted(beside: int, alone: float) -> float | None:
    """Return the tokens/s that are asked for, of what two threads reach alone."""
    if beside == 0:
        return None
    if beside == 1:
        return ONE_BESIDE * alone
    return OF_FAIR_SHARE * alone * min(1.0, (os.cpu_count() or 1) / (THREADS + beside))


def rows(settings: BusyConfig, workers: dict[str, Worker]) -> Iterator[Row]:
    """Yield what is measured, beside nothing first."""
    alone = 0.0
    for number in sorted({0, *settings.beside}):
        with busy(number):
            seconds = take_turns({name: worker.step for name, worker in workers.items()}, settings.rounds)
        speeds = [TOKENS / statistics.median(seconds[name]) for name in WAYS]
        alone = alone or speeds[0]
        yield Row(number, speeds, wanted(number, alone))


def verdict(found: list[Row]) -> str:
    """Return how many goals are met."""
    goals = [row.met for row in found if row.wanted is not None]
    return f"Goals: {sum(goals)} of {len(goals)} met."


@cli.tool
def main(settings: BusyConfig) -> None:
    contenders = {
        name: Contender("ours", JOB, False, "cpu", threads, spin=spin) for name, (threads, spin) in WAYS.items()
    }
    workers, failures = start(contenders, in_turn=True)
    if failures:
        raise RuntimeError("; ".join(failures.values()))
    said = f"`python -m benchmarks.busy`: tokens/s, medians of {settings.rounds} rounds; {machine('cpu')}."
    report(f"# A busy machine\n\n{said}\n", HEAD, rows(settings, workers), verdict, settings.output)
    for worker in workers.values():
        worker.end()


if __name__ == "__main__":
    cli.run(main)
