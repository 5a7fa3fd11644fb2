"""The project's training step against its peers', in one run.

    make bench        CPU, fp32, eager and compiled; writes results/benchmark-cpu.md and a bar chart
    make bench-gpu    bf16 under autocast, compiled; results/benchmark-cuda.md; wants the memory of an H200

One process a model, all of a table alive at once; they take one step each in turn, so that the machine's drift hits all
alike, and a ratio is the median of those within a round. Same parameters within 3 %, same tokens, same optimizer (fused
AdamW). MFU is 6 FLOPs for each active parameter that multiplies and each token, and attention's, over what torch's
products of large matrices reach in the same rounds; the causal mask is not credited. Memory is that of a step, imports
left out: on a GPU what is allocated, on a CPU what is resident. On a GPU a contender keeps 12 bytes a parameter while
the others step, and takes the rest again in a step that is not timed. What was found is kept by day beside the report,
as JSON, and goals are judged by all days.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import torch
from matplotlib import pyplot

from benchmarks import days, spending
from benchmarks.contenders import DENSE, MIXTURES, Sizes
from benchmarks.measure import check_counts, interval, judged, machine, machine_name, ratios, take_turns
from benchmarks.spending import Spending
from benchmarks.workers import RATE, Contender, Result, start
from core import cli
from core.device_peaks import known_peak

matplotlib.use("Agg")

OURS = "ours"
WITHOUT_KERNELS = "ours, cpu_kernels=off"
OVERRIDES: dict[str, dict[str, Any]] = {WITHOUT_KERNELS: {"cpu_kernels": "off"}}
LEAN = 0.85
"""Memory of the leanest peer that ours should do with."""
DENSE_1B, MIXTURE_1B = "1B dense, compiled", "1B mixture of 8 experts, compiled"
KERNELS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm", "aten::_scaled_dot_product")
"""Operators that all peers call alike, by the beginning of their names."""
MIXTURE_OF_DENSE = 0.6
"""FLOP/s of the mixture that are asked for on a GPU, as a part of the dense model's."""
TOLERANCE = 0.03
"""How far a peer's number of parameters may be from ours."""
PACKAGES = ("torch", "litgpt", "transformers", "x-transformers", "torchtitan")


@dataclass(frozen=True)
class CompareConfig:
    """Holds the fields that `python -m benchmarks.compare` takes.

    Attributes:
        device: the device that all compute on.
        rounds: the number of rounds, in each of which all take a step.
        threads: the number of threads of each process.
        only: make only the tables whose title holds this.
        layers: the number of layers; null: the setting's.
        output: the report; null: results/benchmark-DEVICE.md.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    rounds: int = 10
    threads: int = 2
    only: str = ""
    layers: int | None = None
    output: Path | None = None

    def __post_init__(self) -> None:
        check_counts(self, rounds=1, threads=1, layers=1)


class Case(NamedTuple):
    """A table: one setting, computed by ours and by others.

    Attributes:
        others: peers, and ours without its kernels for CPUs.
        goal: tokens/s of the fastest peer that ours should reach, as a factor, by the lower end of its interval.
    """

    title: str
    sizes: Sizes
    others: tuple[str, ...]
    compiled: bool
    goal: float


class Row(NamedTuple):
    """One contender of a case.

    Attributes:
        speed: tokens/s of ours, as a factor on this one's, and so above 1 where ours is faster: the median of rounds.
        between: the ends of its interval.
        spent: where a step's time goes; of ours and of the fastest peer alone.
    """

    name: str
    seconds: float
    speed: float
    between: tuple[float, float]
    mfu: float
    result: Result
    spent: Spending


def cases(device: str) -> Iterator[Case]:
    """Yield what is compared. A dense model's FFN is as wide as the two experts of a token are together."""
    if device == "cuda":
        dense = Sizes(32768, 16, 2048, 16, 5632, 4096, 4)
        yield Case(DENSE_1B, dense, DENSE, True, 1.05)
        mixture = Sizes(32768, 16, 1024, 16, 2304, 4096, 8, num_experts=8)
        yield Case(MIXTURE_1B, mixture, MIXTURES, True, 1.10)
        return
    dense = Sizes(4096, 4, 256, 4, 688, 256, 8)
    mixture = dense._replace(hidden=344, num_experts=8)
    yield Case("Dense, eager", dense, (WITHOUT_KERNELS, *DENSE), False, 1.05)
    yield Case("8 experts, eager", mixture, (WITHOUT_KERNELS, *MIXTURES), False, 1.10)
    yield Case("64 experts, eager", mixture._replace(num_experts=64), (WITHOUT_KERNELS, *MIXTURES), False, 1.10)
    yield Case("Dense, compiled", dense, DENSE, True, 1.03)
    yield Case("8 experts, compiled", mixture, MIXTURES, True, 1.05)


def measure(case: Case, config: CompareConfig, say: Callable[[str], None]) -> list[Row]:
    """Measure ours first, then the peers; one that fails is named with its message, and left out."""
    contenders = {
        name: Contender(name, case.sizes, case.compiled, config.device, config.threads, OVERRIDES.get(name))
        for name in (OURS, *case.others, RATE)
    }
    workers, failures = start(contenders, in_turn=True)
    for name, failure in failures.items():
        if name.startswith(OURS):
            raise RuntimeError(failure)
        say(f"{name} left out: {failure}\n")
    seconds = take_turns({name: worker.step for name, worker in workers.items()}, config.rounds)
    of_rounds = {name: ratios(seconds[name], seconds[OURS]) for name in workers if name != RATE}
    speeds = {name: statistics.median(found) for name, found in of_rounds.items()}
    profiled = [OURS, *sorted(filter(is_peer, speeds), key=speeds.__getitem__)[:1]]
    spent = {name: workers[name].profile() for name in profiled}
    results = {name: worker.end() for name, worker in workers.items()}
    rate = results[RATE].flops / statistics.median(seconds[RATE])
    for name in case.others:
        if name in results:
            off = abs(results[name].parameters / results[OURS].parameters - 1)
            assert off <= TOLERANCE, f"{name}: {results[name].parameters} parameters, ours {results[OURS].parameters}"
    return [
        Row(
            name,
            statistics.median(seconds[name]),
            speeds[name],
            interval(of_rounds[name]),
            results[name].flops / statistics.median(seconds[name]) / rate,
            results[name],
            spent.get(name, Spending({}, 0)),
        )
        for name in speeds
    ]


def table(case: Case, rows: list[Row]) -> Iterator[str]:
    sizes = case.sizes
    yield "| | tokens/s | ours is faster by | MFU | peak memory, MB | first step, s | parameters, M |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        least, most = row.between
        yield (
            f"| {row.name} | {sizes.batch_size * sizes.seq_len / row.seconds:,.0f} "
            f"| {row.speed:.2f} ({least:.2f} to {most:.2f}) | {100 * row.mfu:.0f} % "
            f"| {row.result.memory / 1e6:,.0f} | {row.result.first_step:.1f} | {row.result.parameters / 1e6:.1f} |"
        )


def is_peer(name: str) -> bool:
    return not name.startswith(OURS)


def peers_of(rows: list[Row]) -> list[Row]:
    return [row for row in rows if is_peer(row.name)]


def fastest_of(rows: list[Row]) -> Row:
    return min(peers_of(rows), key=lambda row: row.speed)


def leanest_of(rows: list[Row]) -> tuple[Row, float]:
    """Return the peer that needs the least memory, and ours as a part of that."""
    leanest = min(peers_of(rows), key=lambda row: row.result.memory)
    return leanest, rows[0].result.memory / leanest.result.memory


def of_today(rows: list[Row]) -> dict[str, Any]:
    """Return what days.recorded keeps of a table."""
    fastest, (_, lean) = fastest_of(rows), leanest_of(rows)
    least, most = fastest.between
    return {"peer": fastest.name, "speed": fastest.speed, "least": least, "most": most, "memory": lean}


def verdict(case: Case, rows: list[Row]) -> str:
    if not peers_of(rows):
        return "No peer does this at all."
    fastest, (leanest, lean) = fastest_of(rows), leanest_of(rows)
    least, most = fastest.between
    return (
        f"Goal {case.goal} times the fastest peer ({fastest.name}), by the lower end of the interval: "
        f"{fastest.speed:.2f} ({least:.2f} to {most:.2f}), {judged(least >= case.goal)}. Goal {LEAN} times the memory "
        f"of the leanest peer ({leanest.name}): {lean:.2f}, {judged(lean <= LEAN)}."
    )


def bound(rows: list[Row]) -> str:
    """Return about how far ahead a model could be whose products are those of the fastest peer."""
    peer = fastest_of(rows)
    share = sum(value for name, value in peer.spent.shares.items() if name.startswith(KERNELS))
    return (
        f"Matrix products and attention's kernels are {100 * share:.0f} % of {peer.name}'s step: by the same ones, and "
        f"with nothing else to do, a model would be about {1 / share:.2f} times as fast. (Own time of operators. The "
        "profiler makes small ones slower, which raises the bound; fetching fresh memory for results counts as theirs, "
        "which lowers it.)"
    )


def profile(rows: list[Row]) -> Iterator[str]:
    """Return where the time goes: the operators that take most of it in ours and in the fastest peer."""
    both = [rows[0], *([fastest_of(rows)] if peers_of(rows) else [])]
    yield from spending.table({row.name: row.spent for row in both})


def goals_of_gpu(ours: dict[str, Row], device: str) -> Iterator[str]:
    """Yield ours against the machine, and the mixture against the dense model; each only where it was measured.

    Args:
        ours: by title of the table.
        device: its name.
    """
    done = {title: row.result.flops / row.seconds for title, row in ours.items()}
    for title, row in ours.items():
        known = known_peak(device, "bf16", tf32=False)
        peak = done[title] / row.mfu if known is None else known
        of = "large products" if known is None else "the data sheet"
        part = done[title] / peak
        yield f"{title}: {done[title] / 1e12:.0f} TFLOP/s, {100 * part:.0f} % of {of} ({peak / 1e12:.0f})."
        if title == DENSE_1B:
            yield f"Goal 50 %: {judged(part >= 0.5)}.\n"
    if DENSE_1B in done and MIXTURE_1B in done:
        part = done[MIXTURE_1B] / done[DENSE_1B]
        met = judged(part >= MIXTURE_OF_DENSE)
        yield f"Goal the mixture at {MIXTURE_OF_DENSE} of the dense model's TFLOP/s: {part:.2f}, {met}."


def draw(measured: dict[str, list[Row]], path: Path) -> None:
    """Draw tokens/s of each contender, ours being 1: one group of bars a table."""
    figure, axes = pyplot.subplots(1, len(measured), figsize=(3 * len(measured), 3.6), sharey=True, squeeze=False)
    for axis, (title, rows) in zip(axes[0], measured.items(), strict=True):
        names, heights = [row.name for row in rows], [1 / row.speed for row in rows]
        bars = axis.bar(names, heights, color=["tab:blue" if n.startswith(OURS) else "tab:gray" for n in names])
        axis.bar_label(bars, fmt="%.2f", fontsize=8)
        axis.margins(y=0.1)  # for the labels
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    axes[0][0].set_ylabel("tokens/s, of ours")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@cli.tool
def main(config: CompareConfig) -> None:
    torch.set_num_threads(config.threads)
    output = config.output or Path(f"results/benchmark-{config.device}.md")
    output.parent.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    started = time.perf_counter()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES if find_spec(name.replace("-", "_")))
    precision = "fp32" if config.device == "cpu" else "bf16 under autocast"
    say(f"# The training step against the peers', {config.device}\n")
    say(
        f"`python -m benchmarks.compare device={config.device} threads={config.threads}`: {precision}, "
        f"medians of {config.rounds} rounds in which all take turns.\n{machine(config.device)}; {versions}.\n"
    )
    say(
        "Ours is the SpanNorm model. Every process has train.py's settings of malloc and of idle threads, which any "
        f"user can give any of them; `{WITHOUT_KERNELS}` has none of the kernels that are written for CPUs. In "
        "brackets are intervals that hold the median of rounds 95 times in 100. `benchmarks/compare.py` says how it is "
        "measured.\n"
    )
    say(f"![Tokens per second]({output.stem}.png)")
    measured: dict[str, list[Row]] = {}
    for case in cases(config.device):
        if config.only not in case.title:
            continue
        if config.layers:
            case = case._replace(sizes=case.sizes._replace(num_layers=config.layers))
        sizes = ", ".join(f"{name} {value}" for name, value in case.sizes._asdict().items())
        say(f"\n## {case.title}\n\n{sizes}.\n")
        rows = measured[case.title] = measure(case, config, say)
        for line in table(case, rows):
            say(line)
        say(f"\n{verdict(case, rows)}\n")
        if peers_of(rows) and config.device == "cpu":  # elsewhere a profile names each library's own kernels
            say(f"{bound(rows)}\n")
        for line in profile(rows):
            say(line)
        output.write_text("\n".join(lines) + "\n")  # what is there if it is ended early
    if config.device == "cuda":
        say("\n## Against the machine\n")
        for line in goals_of_gpu({title: rows[0] for title, rows in measured.items()}, torch.cuda.get_device_name()):
            say(line)
    if not config.only and not config.layers:  # a part, or another model, would stand for the whole
        goals = {case.title: case.goal for case in cases(config.device)}
        found = {title: of_today(rows) for title, rows in measured.items() if peers_of(rows)}
        say("\n## Over days and machines\n")
        records = days.recorded(output.with_suffix(".json"), machine_name(config.device), found)
        for line in days.judgement(records, goals):
            say(line)
    draw(measured, output.with_suffix(".png"))
    say(f"\nThe whole took {(time.perf_counter() - started) / 60:.0f} minutes.")
    output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    cli.run(main)
