"""Score texts as the lm-evaluation-harness asks for it, beside its own HFLM on the export: tokens/s, and memory.

    python -m benchmarks.evaluation                  CPU, fp32, one thread; writes results/evaluation-cpu.md
    python -m benchmarks.evaluation only=100M        the models whose names have that in them

Both answer the same requests for log-likelihoods, in batches of eight, and agree on the answers: questions with four
answers each, long contexts with one answer each, and a text that is read window by window, as perplexity is measured.
"""

import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lm_eval
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from torch.profiler import ProfilerActivity, profile
from transformers.utils import logging

from benchmarks.generation import MODELS, VOCAB_SIZE, Pair, make_pair
from benchmarks.measure import check_counts, judged, machine, ratios, report, take_turns, timed
from benchmarks.spending import Spending, spending, table
from core import cli
from core.errors import require
from datamodules.tokenizers import ByteTokenizer
from tools.evaluation.adapter import Adapter
from tools.exporting.tokenizer import to_hugging_face

GOAL, BATCH, WINDOW = 1.2, 8, 512
Request = tuple[tuple[str, str], list[int], list[int]]
"""Names that tell requests apart, the context's tokens, and those of its continuation."""


@dataclass(frozen=True)
class EvaluationBenchmarkConfig:
    """Holds the fields that `python -m benchmarks.evaluation` takes.

    Attributes:
        device: the device that both compute on.
        only: a part of the names of the models to measure; null: all.
        questions: how many there are with four answers each; of long contexts and windows there are an eighth.
        rounds: the number of rounds, in each of which both answer.
        threads: the number of threads that compute.
        output: the report; null: results/evaluation-DEVICE.md.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    only: str | None = None
    questions: int = 64
    rounds: int = 3
    threads: int = 1
    output: Path | None = None

    def __post_init__(self) -> None:
        check_counts(self, questions=8, rounds=1, threads=1)
        valid = f"a part of one of the names {', '.join(MODELS)}"
        require(self.only is None or any(self.only in name for name in MODELS), "only", self.only, valid)


def _tokens(number: int) -> list[int]:
    drawn: list[int] = torch.randint(VOCAB_SIZE - 1, (number,)).tolist()
    return drawn


def workloads(questions: int) -> dict[str, list[Request]]:
    """Return the requests of each kind, by its name."""
    asked = [(number, _tokens(24 + number % 16)) for number in range(questions)]
    few = max(1, questions // 8)
    return {
        "questions, four answers each": [
            ((f"question {number}", f"answer {choice}"), context, _tokens(4 + choice))
            for number, context in asked
            for choice in range(4)
        ],
        "long contexts": [
            ((f"context {number}", ""), _tokens(WINDOW * 7 // 8), _tokens(WINDOW // 8)) for number in range(few)
        ],
        "a text by windows": [(("", f"window {number}"), _tokens(1), _tokens(WINDOW)) for number in range(few)],
    }


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return the most bytes that were allocated at once beyond those that were there before; on a CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    assert profiled.profiler is not None
    now = most = 0
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


class Row(NamedTuple):
    """Holds what was measured of a model and a kind of requests.

    Attributes:
        model, kind: their names.
        ours, theirs: tokens per second, contexts counted once for each continuation.
        ratios: of tokens per second in each round, ours by theirs.
        memory: bytes at a time beside the weights, ours and theirs; on a GPU not measured.
        spent: where the time goes, by who answers.
    """

    model: str
    kind: str
    ours: float
    theirs: float
    ratios: list[float]
    memory: tuple[int, int] | None
    spent: Mapping[str, Spending]

    def __str__(self) -> str:
        middle, least, most = statistics.median(self.ratios), min(self.ratios), max(self.ratios)
        figures = f"{self.ours:,.0f} | {self.theirs:,.0f} | {middle:.2f} ({least:.2f} to {most:.2f})"
        memory = "- | - | -" if self.memory is None else " | ".join(f"{size / 1e6:.1f}" for size in self.memory)
        memory += "" if self.memory is None else f" | {self.memory_ratio:.2f}"
        return f"| {self.model} | {self.kind} | {figures} | {memory} |"

    @property
    def memory_ratio(self) -> float:
        """Return ours by theirs; 0 where it was not measured."""
        return 0.0 if self.memory is None else self.memory[0] / self.memory[1]


HEAD = (
    "| model | requests | ours, tokens/s | HFLM | ratio (rounds) | memory, ours, MB | HFLM | ratio |\n"
    "|---|---|---|---|---|---|---|---|"
)


def contenders(pair: Pair, device: str) -> dict[str, Any]:
    """Return both, which answer lists of requests."""
    tokenizer = ByteTokenizer()
    options = {"tokenizer": to_hugging_face(tokenizer, WINDOW), "batch_size": BATCH, "max_length": WINDOW}
    return {
        "ours": Adapter(pair.ours, tokenizer, WINDOW, BATCH),
        "theirs": HFLM(pretrained=pair.theirs, backend="causal", device=device, **options),
    }


def answer(model: Any, requests: list[Request]) -> list[tuple[float, bool]]:
    answers: list[tuple[float, bool]] = model._loglikelihood_tokens(requests, disable_tqdm=True)
    return answers


def check_agreement(found: dict[str, list[tuple[float, bool]]]) -> None:
    """Hold the log-likelihoods against each other."""
    mine, others = (torch.tensor([value for value, _ in answers]) for answers in found.values())
    torch.testing.assert_close(mine, others, rtol=1e-3, atol=1e-2)


def rows(settings: EvaluationBenchmarkConfig) -> Iterator[Row]:
    """Yield what is measured of each model and kind of requests."""
    for name, overrides in MODELS.items():
        if settings.only is not None and settings.only not in name:
            continue
        pair = make_pair(overrides, WINDOW, settings.device)
        both = contenders(pair, settings.device)
        for kind, requests in workloads(settings.questions).items():
            asked = {who: partial(answer, model, requests) for who, model in both.items()}
            check_agreement({who: ask() for who, ask in asked.items()})
            seconds = take_turns({who: timed(ask, settings.device) for who, ask in asked.items()}, settings.rounds)
            tokens = sum(len(context) + len(continuation) for _, context, continuation in requests)
            rates = {who: tokens / statistics.median(values) for who, values in seconds.items()}
            memory = None
            if settings.device == "cpu":
                memory = peak_bytes(asked["ours"]), peak_bytes(asked["theirs"])
            of_rounds = ratios(seconds["theirs"], seconds["ours"])
            label = f"{name}, {pair.parameters / 1e6:.1f}M"
            spent = {who: spending(ask, settings.device) for who, ask in asked.items()}
            yield Row(label, kind, rates["ours"], rates["theirs"], of_rounds, memory, spent)


def verdict(found: list[Row]) -> str:
    """Return how the two goals came out, each by its worst row, and where the slowest one's time goes."""
    slowest = min(found, key=lambda row: min(row.ratios))
    largest = max(found, key=lambda row: row.memory_ratio)
    return (
        f"Goal {GOAL} times HFLM's in every row and round: {judged(min(slowest.ratios) >= GOAL)}, the least is "
        f"{min(slowest.ratios):.2f} ({slowest.model}, {slowest.kind}).\n"
        f"Goal of no more memory: {judged(largest.memory_ratio <= 1)}, the most is {largest.memory_ratio:.2f} "
        f"({largest.model}, {largest.kind}).\n\n"
        f"Where the time of {slowest.model}, {slowest.kind} goes:\n\n" + "\n".join(table(slowest.spent))
    )


@cli.tool
def main(settings: EvaluationBenchmarkConfig) -> None:
    torch.set_num_threads(settings.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="transformers")
    torch.manual_seed(0)
    only = "" if settings.only is None else f" only={settings.only}"
    head = (
        f"# Scoring texts on {settings.device}, beside HFLM\n\n"
        f"`python -m benchmarks.evaluation device={settings.device} threads={settings.threads}{only}`: "
        f"batches of {BATCH}, "
        f"fp32; medians of {settings.rounds} rounds in which both take turns.\n"
        f"torch {torch.__version__}, transformers {transformers.__version__}, lm-eval {lm_eval.__version__}; "
        f"{machine(settings.device)}.\n"
    )
    report(head, HEAD, rows(settings), verdict, settings.output or Path(f"results/evaluation-{settings.device}.md"))


if __name__ == "__main__":
    cli.run(main)
