"""Generate text beside transformers, which has the same weights by tools.export: tokens/s, and time to the first.

    python -m benchmarks.generation                  CPU, fp32, one thread; writes results/generation-cpu.md
    python -m benchmarks.generation only=100M        the models whose names have that in them

Ours is what `python -m tools.generate` and the lm-evaluation-harness' adapter call; theirs `generate` on the exported
model, with a cache as it is by default. Both are greedy and take turns. The weights are those of initialization, and no
token ends a text.
"""

import statistics
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers.utils import logging

from benchmarks.measure import check_counts, judged, machine, ratio, ratios, report, take_turns, timed
from benchmarks.spending import Spending, spending, table
from core import cli
from core.build import build
from core.errors import require
from lightning_modules.composing import compose_run
from lightning_modules.generation import feed, stream
from lightning_modules.layers.kv_cache import KVCache
from lightning_modules.transformer import Transformer
from tools.exporting import native, remote_code

VOCAB_SIZE, GOAL = 257, 1.5
MODELS = {
    "default job": ["experiment=moe_spannorm"],
    "dense, default size": ["experiment=dense_prenorm"],
    "100M dense": [
        "experiment=dense_prenorm",
        "model.num_layers=14",
        "model.dim=768",
        "model.num_heads=12",
        "model.ffn_dim=2048",
    ],
}
"""Overrides of each; the dense ones are exported as a Llama, the first one with code of its own."""


@dataclass(frozen=True)
class GenerationBenchmarkConfig:
    """Holds the fields that `python -m benchmarks.generation` takes.

    Attributes:
        device: the device that both compute on.
        only: a part of the names of the models to measure; null: all.
        prompts: tokens of a prompt.
        batches: prompts side by side.
        num_tokens: how many are added.
        rounds: the number of rounds, in each of which both generate.
        threads: the number of threads that compute.
        output: the report; null: results/generation-DEVICE.md.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    only: str | None = None
    prompts: tuple[int, ...] = (16, 512)
    batches: tuple[int, ...] = (1, 8)
    num_tokens: int = 256
    rounds: int = 3
    threads: int = 1
    output: Path | None = None

    def __post_init__(self) -> None:
        check_counts(self, prompts=1, batches=1, num_tokens=2, rounds=1, threads=1)
        valid = f"a part of one of the names {', '.join(MODELS)}"
        require(self.only is None or any(self.only in name for name in MODELS), "only", self.only, valid)


class Pair(NamedTuple):
    """Holds one model in both forms.

    Attributes:
        ours: in eval mode.
        theirs: likewise, made of the export.
        kind: its class.
        parameters: how many.
    """

    ours: Transformer
    theirs: Any
    kind: str
    parameters: int


def make_pair(overrides: list[str], longest: int, device: str) -> Pair:
    """Return an initialized model and what transformers makes of its export.

    Args:
        overrides: those of train.py.
        longest: tokens in a text.
        device: where both are to be.
    """
    torch.manual_seed(0)
    module: Any = build(compose_run(["data=synthetic", *overrides]), "module", vocab_size=VOCAB_SIZE)
    module.configure_model()
    model = module.model.eval()
    with tempfile.TemporaryDirectory() as folder:
        family = native.find_family(model)
        if isinstance(family, str):
            remote_code.write(model, Path(folder), longest, None)
        else:
            native.write(model, family, Path(folder), longest, None)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    total, _ = model.num_parameters()
    return Pair(model.to(device), theirs.to(device), type(theirs).__name__, total)


def ours(pair: Pair, prompts: Tensor, num_tokens: int) -> list[list[int]]:
    """Return the token ids that are added, by prompt."""
    seeds, window = list(range(len(prompts))), prompts.size(1) + num_tokens
    new = list(stream(pair.ours, prompts.tolist(), num_tokens, 0.0, seeds, window))
    return [list(row) for row in zip(*new, strict=True)]


def theirs(pair: Pair, prompts: Tensor, num_tokens: int) -> list[list[int]]:
    options = {"attention_mask": torch.ones_like(prompts), "pad_token_id": 0, "do_sample": False}
    tokens = pair.theirs.generate(prompts, **options, min_new_tokens=num_tokens, max_new_tokens=num_tokens)
    new: list[list[int]] = tokens[:, prompts.size(1) :].tolist()
    return new


@torch.inference_mode()
def check_agreement(pair: Pair, prompts: Tensor) -> None:
    """Hold the logits of the first new token against each other."""
    cache = KVCache(pair.ours.config.num_layers, prompts.size(1) + 4)
    mine = feed(pair.ours, cache, prompts.tolist(), [0] * len(prompts))[:, prompts.size(1) - 1]
    others = pair.theirs(prompts).logits[:, -1]
    torch.testing.assert_close(mine, others, rtol=1e-3, atol=1e-3)


class Row(NamedTuple):
    """Holds what was measured of a model, a prompt's length and a number of prompts.

    Attributes:
        model, kind: its name, and transformers' class.
        prompt, batch: tokens of a prompt, and prompts.
        ours, theirs: tokens per second.
        ratios: of tokens per second in each round, ours by theirs.
        first: milliseconds to the first token, ours and theirs.
        first_ratio: the median over rounds of ours by theirs.
        spent: where the time goes, by who generates.
    """

    model: str
    kind: str
    prompt: int
    batch: int
    ours: float
    theirs: float
    ratios: list[float]
    first: tuple[float, float]
    first_ratio: float
    spent: Mapping[str, Spending]

    def __str__(self) -> str:
        middle, least, most = statistics.median(self.ratios), min(self.ratios), max(self.ratios)
        figures = f"{self.ours:,.0f} | {self.theirs:,.0f} | {middle:.2f} ({least:.2f} to {most:.2f})"
        first = f"{self.first[0]:.1f} | {self.first[1]:.1f} | {self.first_ratio:.2f}"
        return f"| {self.model} | {self.kind} | {self.prompt} | {self.batch} | {figures} | {first} |"


HEAD = (
    "| model | transformers' class | prompt | batch | ours, tokens/s | theirs | ratio (rounds) "
    "| first token, ours, ms | theirs | ratio |\n|---|---|---|---|---|---|---|---|---|---|"
)


def rows(settings: GenerationBenchmarkConfig) -> Iterator[Row]:
    """Yield what is measured of each model, prompt's length and number of prompts."""
    for name, overrides in MODELS.items():
        if settings.only is not None and settings.only not in name:
            continue
        pair = make_pair(overrides, max(settings.prompts) + settings.num_tokens, settings.device)
        name = f"{name}, {pair.parameters / 1e6:.1f}M"
        for length in settings.prompts:
            for batch in settings.batches:
                prompts = torch.randint(VOCAB_SIZE, (batch, length), device=settings.device)
                check_agreement(pair, prompts)
                whole, first = (
                    {way.__name__: partial(way, pair, prompts, number) for way in (ours, theirs)}
                    for number in (settings.num_tokens, 1)
                )
                seconds, until_first = (
                    take_turns({who: timed(way, settings.device) for who, way in ways.items()}, settings.rounds)
                    for ways in (whole, first)
                )
                tokens = batch * settings.num_tokens
                rates = {who: tokens / statistics.median(values) for who, values in seconds.items()}
                delays = {who: 1e3 * statistics.median(values) for who, values in until_first.items()}
                yield Row(
                    name,
                    pair.kind,
                    length,
                    batch,
                    rates["ours"],
                    rates["theirs"],
                    ratios(seconds["theirs"], seconds["ours"]),
                    (delays["ours"], delays["theirs"]),
                    ratio(until_first["ours"], until_first["theirs"]),
                    {who: spending(way, settings.device) for who, way in whole.items()},
                )


def verdict(found: list[Row]) -> str:
    """Return how the two goals came out, each by its worst row, and where the slowest one's time goes."""
    slowest = min(found, key=lambda row: min(row.ratios))
    latest = max(found, key=lambda row: row.first_ratio)
    return (
        f"Goal {GOAL} times theirs in every row and round: {judged(min(slowest.ratios) >= GOAL)}, the least is "
        f"{min(slowest.ratios):.2f} ({slowest.model}, prompt {slowest.prompt}, batch {slowest.batch}).\n"
        f"Goal of a first token no later than theirs: {judged(latest.first_ratio <= 1)}, the most is "
        f"{latest.first_ratio:.2f} ({latest.model}, prompt {latest.prompt}, batch {latest.batch}).\n\n"
        f"Where the time of {slowest.model}, prompt {slowest.prompt}, batch {slowest.batch} goes; what is called "
        "between the operators is Python:\n\n" + "\n".join(table(slowest.spent))
    )


@cli.tool
def main(settings: GenerationBenchmarkConfig) -> None:
    torch.set_num_threads(settings.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="transformers")
    only = "" if settings.only is None else f" only={settings.only}"
    head = (
        f"# Generating on {settings.device}, beside transformers\n\n"
        f"`python -m benchmarks.generation device={settings.device} threads={settings.threads}{only}`: "
        f"{settings.num_tokens} new tokens, greedy, fp32; medians of {settings.rounds} rounds in which both take "
        f"turns.\ntorch {torch.__version__}, transformers {transformers.__version__}; {machine(settings.device)}.\n"
    )
    report(head, HEAD, rows(settings), verdict, settings.output or Path(f"results/generation-{settings.device}.md"))


if __name__ == "__main__":
    cli.run(main)
