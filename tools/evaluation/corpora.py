"""Validation loss of a model on prepared corpora: in all, by position, and by domain."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.errors import require
from core.memory import memory_of_machine
from core.open_run import OpenRun
from datamodules.shard_corpus import ShardCorpus


@dataclass(frozen=True)
class Loss:
    """The loss on one corpus, or on one source of a mixture.

    Attributes:
        name: of the corpus.
        loss: nats per token.
        bits_per_byte: of its text; None: there is no text.
        tokens: predicted ones.
        by_position: [seq_len], nats per token of those predicted at each position; the first sees one token.
    """

    name: str
    loss: float
    bits_per_byte: float | None
    tokens: int
    by_position: list[float]

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(min(self.loss, 700.0))


def losses_of(run: OpenRun, paths: list[str], batches: int | None) -> list[Loss]:
    """Yield the losses of each corpus, one after the other; those of a mixture's sources follow the whole.

    Args:
        run: the model, and the data that it was trained on.
        paths: prepared corpora, of which every whole sequence of the validation split counts; none: the validation
            sample of the run's own data.
        batches: at most so many of data.batch_size sequences each.

    Raises:
        ConfigError: a corpus that another tokenizer made, one too short for a single sequence, or two of one name.
        CorpusError: it cannot be read.
    """
    if not paths:
        own = run.datamodule
        own.prepare_data()
        return measure(run.module, own, "val", min(own.num_val_batches, batches or own.num_val_batches))
    names = [Path(path).absolute().name for path in paths]
    differ = len(set(names)) == len(names)
    require(differ, "data", ",".join(paths), f"corpora whose folders' names differ, not {', '.join(names)}")
    found = []
    for path, name in zip(paths, names, strict=True):
        corpus = open_corpus(run, path)
        every = -(-corpus.num_val_samples // corpus.batch_size)
        found += measure(run.module, corpus, name, min(every, batches or every))
    return found


def open_corpus(run: OpenRun, path: str) -> ShardCorpus:
    """Open a prepared corpus for a run's model.

    Raises:
        ConfigError: another tokenizer made it, its documents end otherwise, or it is too short for one sequence.
    """
    data = run.config.data
    corpus = ShardCorpus(path, data.seq_len, data.batch_size, document_mask=data.get("document_mask", False))
    ours, theirs = run.datamodule.tokenizer, corpus.tokenizer
    same = getattr(ours, "content", ours.name) == getattr(theirs, "content", theirs.name)
    require(same, "data", path, f"a corpus of the run's own tokenizer, {ours.name}; this one has {theirs.name}")
    end = f"one whose documents token {ours.end_of_document} closes, as in the run's own data; here it is "
    require(ours.end_of_document == theirs.end_of_document, "data", path, f"{end}{theirs.end_of_document}")
    most = corpus.split("val").num_tokens - 1
    require(corpus.num_val_samples > 0, "data", path, f"one with {data.seq_len + 1} validation tokens, not {most + 1}")
    return corpus


@torch.inference_mode()
def measure(module: Any, data: Any, name: str, num_batches: int) -> list[Loss]:
    """Measure the loss over the first `num_batches` of a DataModule's validation sample.

    Args:
        module: a LightningModule whose call gives (Losses of the targets, ...), never all logits at once.
        data: a StreamDataModule.
        name: of the whole; sources have names of their own.
        num_batches: the last may be smaller.

    Raises:
        ConfigError: the machine's memory does not even hold what one block makes of a batch.
    """
    sequences = min(data.batch_size, data.num_val_samples)
    needed, held = 4 * sequences * data.seq_len * module.model_config.dim, memory_of_machine()
    if held is not None:
        valid = f"a batch that fits: one block's output takes {needed:,} bytes, and this machine has {held:,}"
        require(needed <= held, "data.batch_size", data.batch_size, valid)
    num_sources = max(1, len(data.source_names))
    sums = torch.zeros(num_sources, data.seq_len, dtype=torch.float64)
    counts = torch.zeros(num_sources, dtype=torch.float64)
    for batch in _batches(data, num_batches):
        losses, source = token_losses(module, batch), batch.get("source", torch.zeros(len(batch["tokens"])).long())
        sums.index_add_(0, source, losses.cpu().double())
        counts.index_add_(0, source, torch.ones(len(source), dtype=torch.float64))
    whole = _loss(name, sums.sum(0), counts.sum(), data)
    if not data.source_names:
        return [whole]
    domains = zip(data.source_names, sums, counts, data.corpora, strict=True)
    return [whole, *(_loss(domain, total, count, corpus) for domain, total, count, corpus in domains if count > 0)]


def _batches(data: Any, num_batches: int) -> Iterator[dict[str, Tensor]]:
    samples = data.samples("val")
    for batch in range(num_batches):
        first = batch * data.batch_size
        numbers = np.arange(first, min(first + data.batch_size, data.num_val_samples))
        yield {key: torch.from_numpy(rows) for key, rows in samples.read(numbers).items()}


def token_losses(module: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the cross-entropy of each predicted token, in nats, [batch, seq]."""
    batch = {key: rows.to(module.device) for key, rows in batch.items()}
    inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    losses, *_ = module(inputs, batch.get("positions"), targets)
    by_token: Tensor = losses.by_token.view_as(targets)
    return by_token


def _loss(name: str, sums: Tensor, count: Tensor, data: Any) -> Loss:
    by_position = sums / count
    loss = float(by_position.mean())
    tokens = int(count) * len(sums)
    return Loss(name, loss, data.bits_per_byte(loss), tokens, by_position.tolist())


def buckets(by_position: list[float]) -> list[tuple[int, int, float]]:
    """Return (first position, last position, mean loss there): 1, 2, 3-4, 5-8, ..., counted from 1."""
    ends = [1]
    while ends[-1] < len(by_position):
        ends.append(min(2 * ends[-1], len(by_position)))
    starts = [0, *ends[:-1]]
    return [
        (start + 1, end, sum(by_position[start:end]) / (end - start)) for start, end in zip(starts, ends, strict=True)
    ]
