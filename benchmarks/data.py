"""Measure what reading and preparing a corpus costs, against the plainest way to do either.

    python -m benchmarks.data                     writes results/data-cpu.md

Reading: a corpus of random tokens, in the page cache; a raw loop copies windows out of one memory map in an order that
it is given, the stream computes its order, verifies, and hands out what training gets. Preparing: the standard library
as BPE, the start of its processes counted in, against encode_batch of `tokenizers`, whose result is thrown away.
Contenders take turns, so that the machine's drift hits all alike; a ratio is the median of those within a round.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import tokenizers
import torch
from torch import Tensor

from benchmarks.measure import check_counts, machine, ratio, take_turns, timed
from core import cli
from core.build import build
from core.dataclass_cli import OVERRIDES
from core.errors import require
from datamodules.order import permute
from datamodules.preparation.bpe import train_bpe
from datamodules.shard_corpus import ShardCorpus
from datamodules.stdlib_documents import library_documents
from datamodules.writer import write_corpus
from lightning_modules.composing import compose_run

ROOT = Path(__file__).resolve().parents[1]
VOCAB_SIZE, DOCUMENT = 50_000, 1 << 20
Batches = Iterator[Tensor]


@dataclass(frozen=True)
class DataConfig:
    """Holds the fields that `python -m benchmarks.data` takes.

    Attributes:
        overrides: overrides of the model whose speed reading is held against; none: experiment=moe_spannorm.
        tokens: the number of tokens of each corpus.
        window: the number of tokens that are read at a time.
        windows_per_batch: the number of windows in a batch.
        batches: the number of batches in a round.
        rounds: the number of rounds of reading.
        model_steps: the number of steps that the model is timed over.
        documents: prepare so many documents; null: the whole standard library.
        vocabulary: the size of the vocabulary to prepare with.
        prepare_rounds: the number of rounds of preparing.
        threads: the number of threads that compute.
        output: the report.
    """

    overrides: tuple[str, ...] = field(default=("experiment=moe_spannorm",), metadata=OVERRIDES)
    tokens: tuple[int, ...] = (5_000_000, 500_000_000)
    window: int = field(default=1024, metadata={"formerly": "seq_len"})
    windows_per_batch: int = field(default=16, metadata={"formerly": "batch_size"})
    batches: int = 300
    rounds: int = 9
    model_steps: int = field(default=20, metadata={"formerly": "steps"})
    documents: int | None = None
    vocabulary: int = 16_384
    prepare_rounds: int = 3
    threads: int = 1
    output: Path = Path("results/data-cpu.md")

    def __post_init__(self) -> None:
        require(len(self.tokens) > 0, "tokens", "", "an integer, or several with commas between them")
        check_counts(self, tokens=1, window=1, windows_per_batch=1, batches=1, rounds=1, model_steps=2, documents=1)
        check_counts(self, vocabulary=1, prepare_rounds=1, threads=1)


def make_corpus(folder: Path, num_tokens: int) -> Path:
    rng = np.random.default_rng(0)
    sizes = [*[DOCUMENT] * (num_tokens // DOCUMENT), num_tokens % DOCUMENT]
    tokens = ((name, rng.integers(0, VOCAB_SIZE, size, np.uint16)) for name in ("train", "val") for size in sizes[::-1])
    few = (part for n, part in enumerate(tokens) if n <= len(sizes))  # one document to validate on
    write_corpus(folder, ((name, b"", ids) for name, ids in few), VOCAB_SIZE, {"vocab_size": VOCAB_SIZE + 1})
    return folder


def data_of(folder: Path, settings: DataConfig, num_workers: int = 0) -> ShardCorpus:
    return ShardCorpus(str(folder), settings.window, settings.windows_per_batch, num_workers=num_workers)


def raw_batches(folder: Path, settings: DataConfig) -> Batches:
    """Yield batches by a permutation that is held, one shard after the other as if they were one map."""
    shards = [np.load(path, mmap_mode="r").view(np.ndarray) for path in sorted(folder.glob("train-*.npy"))]
    seq_len = settings.window
    windows = [(shard, start) for shard in shards for start in range(0, len(shard) - seq_len, seq_len)]
    order = permute(np.arange(len(windows)), len(windows), 0).tolist()
    for first in range(0, len(order) - settings.windows_per_batch, settings.windows_per_batch):
        chosen = [windows[index] for index in order[first : first + settings.windows_per_batch]]
        rows = [shard[start : start + seq_len + 1].astype(np.int64) for shard, start in chosen]
        yield torch.from_numpy(np.stack(rows))


def stream_batches(data: ShardCorpus) -> tuple[Batches, float]:
    """Return what training gets, and the seconds that it takes to verify all of it, done here beforehand."""
    loader = data.train_dataloader()
    split = loader.dataset.samples.split  # type: ignore[attr-defined]
    size = split.index.page_tokens
    seconds = timed(lambda: [split.slice(start, start + 1) for start in range(0, split.num_tokens, size)])()
    return (batch["tokens"] for batch in loader), seconds


def model_rate(settings: DataConfig) -> float:
    """Return the tokens/s that the model of the overrides trains on."""
    config = compose_run(settings.overrides)
    data = build(config, "data")
    data.prepare_data()
    module = build(config, "module", vocab_size=data.vocab_size)
    times: list[float] = []

    class Clock(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            times.append(time.perf_counter())

    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=settings.model_steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Clock()],
    )
    trainer.fit(module, datamodule=data)
    return float(data.tokens_per_batch / statistics.median(np.diff(times)))


def first_batch(folder: Path, settings: DataConfig) -> None:
    """Do what a run does between its configuration and its first batch."""
    data = data_of(folder, settings)
    data.check()
    next(iter(data.train_dataloader()))


def reading(folder: Path, settings: DataConfig) -> Iterator[str]:
    here, verifying = stream_batches(data_of(folder, settings))
    worker, _ = stream_batches(data_of(folder, settings, num_workers=1))
    readers = {"raw memmap loop": raw_batches(folder, settings), "stream": here, "stream, 1 worker": worker}

    def take(batches: Batches) -> Callable[[], float]:
        return timed(lambda: [next(batches) for _ in range(settings.batches)])

    rounds = take_turns({name: take(batches) for name, batches in readers.items()}, settings.rounds)
    consumed = model_rate(settings)
    tokens = settings.batches * settings.windows_per_batch * settings.window
    yield "| reader | million tokens/s | of the raw loop | times what the model consumes |"
    yield "|---|---|---|---|"
    for name, values in rounds.items():
        rate = tokens / statistics.median(values)
        yield f"| {name} | {rate / 1e6:.1f} | {ratio(rounds['raw memmap loop'], values):.2f} | {rate / consumed:,.0f} |"
    firsts = [1e3 * timed(lambda: first_batch(folder, settings))() for _ in range(settings.rounds + 1)][1:]
    yield f"\nThe model (`{' '.join(settings.overrides)}`) consumes {consumed:,.0f} tokens/s."
    yield f"Checksums and largest ids, once in a process: {verifying:.2f} s for all of the corpus."
    yield f"From the configuration to the first batch: {statistics.median(firsts):.1f} ms (most: {max(firsts):.1f})."


MEMORY = """
import json, sys
from datamodules.shard_corpus import ShardCorpus
batches = iter(ShardCorpus(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])).train_dataloader())
next(batches)

def resident():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return [int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")]

before = resident()
for _ in range(int(sys.argv[4])):
    next(batches)
print(json.dumps([before, resident()]))
"""


def memory(folders: list[Path], settings: DataConfig) -> Iterator[str]:
    """Return the memory of a process of its own for each corpus."""
    yield "| corpus, MB | own memory after the first batch, MiB | and after all | mapped pages of files, MiB |"
    yield "|---|---|---|---|"
    for folder in folders:
        sizes = (settings.window, settings.windows_per_batch, settings.rounds * settings.batches)
        command = [sys.executable, "-c", MEMORY, str(folder), *map(str, sizes)]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        (before, _), (after, mapped) = json.loads(said.splitlines()[-1])
        size = sum(path.stat().st_size for path in folder.iterdir())
        yield f"| {size / 1e6:,.0f} | {before:.1f} | {after:.1f} | {mapped:.0f} |"


FILES = ("texts.jsonl", "tokenizer.json")
PREPARE = """
import sys, time
from datamodules.preparation.prepare import PrepareConfig, prepare
started = time.perf_counter()
prepare(PrepareConfig(input=sys.argv[1], tokenizer=sys.argv[2], output=sys.argv[3]))
print(time.perf_counter() - started)
"""


def preparing(folder: Path, settings: DataConfig) -> Iterator[str]:
    texts = [text for _, text in library_documents()][: settings.documents]
    content = train_bpe(texts, settings.vocabulary)
    (folder / FILES[1]).write_bytes(content)
    strings = [text.decode("utf-8", "replace") for text in texts]
    (folder / FILES[0]).write_text("".join(json.dumps({"text": text}) + "\n" for text in strings))
    library = tokenizers.Tokenizer.from_str(content.decode())
    outputs = (f"prepared-{n}" for n in range(settings.prepare_rounds + 1))

    def prepare_them() -> float:
        command = [sys.executable, "-c", PREPARE, *(str(folder / name) for name in FILES), str(folder / next(outputs))]
        return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    encode = {"encode_batch": timed(lambda: library.encode_batch(strings))}
    rounds = take_turns({**encode, "tools.prepare": prepare_them}, settings.prepare_rounds)
    yield "| | MB/s | of encode_batch |"
    yield "|---|---|---|"
    size = sum(map(len, texts)) / 1e6
    for name, values in rounds.items():
        yield f"| {name} | {size / statistics.median(values):.2f} | {ratio(rounds['encode_batch'], values):.2f} |"


@cli.tool
def main(settings: DataConfig) -> None:
    torch.set_num_threads(settings.threads)
    L.seed_everything(0, verbose=False)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    lines = [
        "# Reading and preparing a corpus\n",
        f"`python -m benchmarks.data`: windows of {settings.window} tokens, batches of {settings.windows_per_batch}; "
        f"medians of {settings.rounds} rounds of\n{settings.batches} batches (preparing: of "
        f"{settings.prepare_rounds} rounds) in which all take turns. torch {torch.__version__}, tokenizers "
        f"{tokenizers.__version__};\n{machine('cpu')}.",
    ]
    with tempfile.TemporaryDirectory() as name:
        corpora = [make_corpus(Path(name) / str(tokens), tokens) for tokens in settings.tokens]
        titles = (f"Reading {max(settings.tokens):,} tokens (uint16)", "Memory", "Preparing, on all cores")
        tables = (reading(corpora[-1], settings), memory(corpora, settings), preparing(Path(name), settings))
        for title, table in zip(titles, tables, strict=True):
            lines += [f"\n## {title}\n", *table]
    print("\n".join(lines))
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    settings.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    cli.run(main)
