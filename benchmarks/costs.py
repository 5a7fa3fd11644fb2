"""Measure what each thing costs a training step of the project, in ratios to the first row of its table.

    python -m benchmarks.costs                   CPU, fp32; writes results/benchmark-costs-cpu.md
    python -m benchmarks.costs device=cuda       bf16 under autocast; results/benchmark-costs-cuda.md

As benchmarks/compare.py does it: one process a contender, in turn. Goals of a few percent are judged by the fastest
steps, as what else the machine does only adds time: the median of so few ratios moves by 3 % from run to run. What data
loading gives and a step consumes is in benchmarks/data.py, the mixture layer alone in benchmarks/moe.py, the monitors
in benchmarks/monitoring.py, and what comes before the first step in benchmarks/start.py.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch

from benchmarks.contenders import Sizes
from benchmarks.measure import check_counts, judged, machine, ratio, take_turns
from benchmarks.overhead import trainer_overhead
from benchmarks.workers import Contender, Result, start
from core import cli
from spannorm import PLACEMENTS

TRAINER = "Lightning's Trainer"
MORE_STREAMS = ("attnres", "residual", "siamesenorm")
MANY_STREAMS = {"hc": 0.8, "mhc": 0.8, "ihc": 0.85, "gr": 0.8}
"""What is asked of each, of prenorm's tokens/s."""


@dataclass(frozen=True)
class CostsConfig:
    """Holds the fields that `python -m benchmarks.costs` takes.

    Attributes:
        device: the device that all compute on.
        rounds: the number of rounds, in each of which all take a step.
        threads: the number of threads of each process.
        only: make only the tables whose title holds this.
        output: the report; null: results/benchmark-costs-DEVICE.md.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    rounds: int = 8
    threads: int = 1
    only: str = ""
    output: Path | None = None

    def __post_init__(self) -> None:
        check_counts(self, rounds=2, threads=1)


class Cost(NamedTuple):
    """One contender: the model's sizes and overrides."""

    sizes: Sizes
    compiled: bool = False
    overrides: Mapping[str, Any] = MappingProxyType({})


class Measured(NamedTuple):
    """One contender.

    Attributes:
        seconds: the median.
        fastest: the least.
        of_first: its time as a multiple of the first one's, the median of those within a round.
    """

    seconds: float
    fastest: float
    of_first: float
    result: Result


Goal = Callable[[dict[str, Measured]], tuple[str, bool]]
"""(what is asked and what came out, whether it is met)."""


class Table(NamedTuple):
    title: str
    costs: dict[str, Cost]
    goals: tuple[Goal, ...] = ()


def by_fastest(measured: dict[str, Measured]) -> dict[str, float]:
    """Return each one's fastest step as a multiple of the first one's."""
    first = next(iter(measured.values())).fastest
    return {name: one.fastest / first for name, one in measured.items()}


def at_most(name: str, limit: float, first: str) -> Goal:
    """Return the goal that `name` takes at most so many times as long as the first row."""

    def goal(measured: dict[str, Measured]) -> tuple[str, bool]:
        value = by_fastest(measured)[name]
        return f"{name} at most {limit:.3g} times {first}: {value:.3f}", value <= limit

    return goal


def fast_enough(name: str, least: float, first: str) -> Goal:
    """Return the goal that `name` has at least that part of the first row's tokens/s."""

    def goal(measured: dict[str, Measured]) -> tuple[str, bool]:
        speed = 1 / by_fastest(measured)[name]
        return f"{name} at least {least:.3g} of {first}'s tokens/s: {speed:.3f}", speed >= least

    return goal


def lean_enough(name: str, most: float, first: str) -> Goal:
    """Return the goal that `name` takes at most so many times the first row's memory."""

    def goal(measured: dict[str, Measured]) -> tuple[str, bool]:
        value = measured[name].result.memory / next(iter(measured.values())).result.memory
        return f"{name} at most {most:.3g} times {first}'s peak memory: {value:.3f}", value <= most

    return goal


def one_stream(measured: dict[str, Measured]) -> tuple[str, bool]:
    of_first = by_fastest(measured)
    slowest = max(of_first.keys() - MORE_STREAMS - MANY_STREAMS.keys(), key=of_first.__getitem__)
    speed = 1 / of_first[slowest]
    return f"no placement of one stream under 0.93 of prenorm's tokens/s; {slowest}: {speed:.3f}", speed >= 0.93


def speed_at_least(name: str, limit: float) -> Goal:
    """Return the goal that `name` gets through at least this share of the first row's tokens/s."""

    def goal(measured: dict[str, Measured]) -> tuple[str, bool]:
        value = 1 / by_fastest(measured)[name]
        return f"{name} at least {limit:.2f} of prenorm's tokens/s: {value:.3f}", value >= limit

    return goal


def memory_at_most(limit: float) -> Goal:
    """Return the goal that nobody's peak memory is more than so many times the first row's."""

    def goal(measured: dict[str, Measured]) -> tuple[str, bool]:
        memory = {name: one.result.memory for name, one in measured.items()}
        first = next(iter(memory.values()))
        most = max(memory, key=memory.__getitem__)
        value = memory[most] / first
        return f"peak memory at most {limit:g} times prenorm's; {most}: {value:.3f}", value <= limit

    return goal


def linear_in_depth(measured: dict[str, Measured]) -> tuple[str, bool]:
    """Compare from 4 to 8 blocks with twice from 2 to 4: what does not depend on depth cancels."""
    few, some, many = (by_fastest(measured)[name] for name in ("2 blocks", "4 blocks", "8 blocks"))
    value = (many - some) / (2 * (some - few))
    return f"time linear in depth within 5 %: a block of the last 4 costs {value:.3f} of one before", value <= 1.05


def tables(device: str) -> Iterator[Table]:
    few_experts, growth = "8 experts", 1.25
    if device == "cuda":
        base, growth = Sizes(32768, 8, 1024, 16, 2816, 2048, 8), 1.15
    else:
        base = Sizes(512, 4, 256, 4, 688, 256, 4)
    half = base._replace(hidden=base.hidden // 2)
    schemes = ["prenorm", *sorted(PLACEMENTS.keys() - {"prenorm"})]
    as_prenorm = at_most("spannorm", 1 / 0.98, "prenorm")
    of_streams = tuple(speed_at_least(name, limit) for name, limit in MANY_STREAMS.items())
    for kind, compiled, names, goals in (
        ("eager", False, schemes, (as_prenorm, one_stream, *of_streams)),
        ("compiled", True, ["prenorm", "spannorm", *MANY_STREAMS], (as_prenorm, *of_streams)),
    ):
        costs = {name: Cost(base, compiled, {"placement": name}) for name in names}
        yield Table(f"Placements, {kind}", costs, goals)
    recomputed = base._replace(num_layers=2 * base.num_layers)
    yield Table(
        "Many streams, each block recomputed",
        {
            name: Cost(recomputed, False, {"placement": name, "activation_checkpointing": True})
            for name in ("prenorm", *MANY_STREAMS)
        },
        (memory_at_most(1.3),),
    )
    yield Table(
        "Depth",
        {f"{n} blocks": Cost(base._replace(num_layers=n)) for n in (2, 4, 8)},
        (linear_in_depth,),
    )
    yield Table(
        "Sequence length, as many tokens",
        {
            f"{base.seq_len * n} positions": Cost(
                base._replace(seq_len=base.seq_len * n, batch_size=base.batch_size // n)
            )
            for n in (1, 2, 4)
        },
    )
    yield Table(
        "Experts, at equal active parameters",
        {
            "dense": Cost(base),
            few_experts: Cost(half._replace(num_experts=8)),
            "16 experts": Cost(half._replace(num_experts=16)),
        },
    )
    wide = half._replace(batch_size=2 * base.batch_size)
    yield Table(
        "Experts, 8 to 64 at 2 of them active",
        {f"{n} experts": Cost(wide._replace(num_experts=n)) for n in (8, 64)},
        (at_most("64 experts", growth, few_experts),),
    )
    deep = base._replace(num_layers=8)
    yield Table(
        "Activation checkpointing",
        {
            "none": Cost(deep),
            "each 2nd block": Cost(deep, False, {"activation_checkpointing": True, "activation_checkpoint_every": 2}),
            "each block": Cost(deep, False, {"activation_checkpointing": True}),
        },
    )
    attnres: dict[str, dict[str, Any]] = {
        "attnres": {"placement": "attnres"},
        "groups of 4": {"placement": "attnres", "placement_options": {"group": 4}},
    }
    rows: dict[str, dict[str, Any]] = {"prenorm": {"placement": "prenorm"}, **attnres}
    speeds = fast_enough("attnres", 0.75, "prenorm"), fast_enough("groups of 4", 0.85, "prenorm")
    for kind, compiled in (("eager", False), ("compiled", True)):
        costs = {name: Cost(deep, compiled, options) for name, options in rows.items()}
        yield Table(f"Attention residuals, 8 blocks, {kind}", costs, speeds)
    again = {"activation_checkpointing": True}
    yield Table(
        "Attention residuals, 8 blocks, with activation checkpointing",
        {name: Cost(deep, False, {**options, **again}) for name, options in rows.items()},
        tuple(lean_enough(name, 1.3, "prenorm") for name in attnres),
    )
    large = base._replace(vocab_size=32768, num_layers=2)
    yield Table(
        "The loss of a vocabulary of 32,768",
        {"all logits at once": Cost(large, False, {"all_logits": True}), "in chunks": Cost(large)},
    )


def measure(table: Table, config: CostsConfig) -> dict[str, Measured]:
    contenders = {
        name: Contender("ours", cost.sizes, cost.compiled, config.device, config.threads, dict(cost.overrides))
        for name, cost in table.costs.items()
    }
    workers, failures = start(contenders, in_turn=config.device != "cpu")  # a GPU has no room for all at once
    assert not failures, failures
    seconds = take_turns({name: worker.step for name, worker in workers.items()}, config.rounds)
    first = next(iter(seconds.values()))
    return {
        name: Measured(statistics.median(seconds[name]), min(seconds[name]), ratio(seconds[name], first), worker.end())
        for name, worker in workers.items()
    }


def lines_of(table: Table, measured: dict[str, Measured]) -> Iterator[str]:
    yield f"\n## {table.title}\n"
    yield (
        "| | ms | time, of the first | fastest step, of the first | tokens/s, of the first | peak memory, MB "
        "| parameters, M |"
    )
    yield "|---|---|---|---|---|---|---|"
    first, fastest = next(iter(table.costs.values())).sizes, by_fastest(measured)
    for name, (seconds, _, of_first, result) in measured.items():
        sizes = table.costs[name].sizes
        tokens = sizes.batch_size * sizes.seq_len / (first.batch_size * first.seq_len)
        yield (
            f"| {name} | {1e3 * seconds:.1f} | {of_first:.3f} | {fastest[name]:.3f} | {tokens / of_first:.3f} "
            f"| {result.memory / 1e6:,.0f} | {result.parameters / 1e6:.1f} |"
        )
    for goal in table.goals:
        text, met = goal(measured)
        yield f"\nGoal: {text}, {judged(met)}."


@cli.tool
def main(config: CostsConfig) -> None:
    torch.set_num_threads(config.threads)
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"# What each thing costs a training step, {config.device}\n")
    say(
        f"`python -m benchmarks.costs device={config.device} threads={config.threads}`: medians of "
        f"{config.rounds} rounds in which all take turns.\ntorch {torch.__version__}; {machine(config.device)}."
    )
    for table in tables(config.device):
        if config.only in table.title:
            for line in lines_of(table, measure(table, config)):
                say(line)
    if config.only in TRAINER:
        for line in trainer_overhead(TRAINER, config.device, config.rounds):
            say(line)
    output = config.output or Path(f"results/benchmark-costs-{config.device}.md")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    cli.run(main)
