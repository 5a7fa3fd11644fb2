"""Verifies a prepared corpus completely, and counts what is in it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from datamodules.expression import MAX_LOSS, SAID_LOSS, describe_loss
from datamodules.index import SPLITS, ArrayFile, CorpusError, Index
from datamodules.shards import Split, sha256_of
from datamodules.storage import Storage, load, read_index
from datamodules.tokenizer_file import LARGEST_ID
from datamodules.tokenizers import read_tokenizer

SAMPLE_TOKENS = 64
CHUNK = 1 << 22  # tokens counted at a time


@dataclass(frozen=True)
class SplitStatistics:
    """Counts what a split holds; document lengths in tokens.

    Attributes:
        num_bytes: of the text, without what is not in the tokens.
        unknown_tokens: how many tokens stand for what the vocabulary does not have.
        lost_bytes: of characters that are not in the tokens, as the preparation measured it; None: it did not yet.
        invalid_bytes: that were no UTF-8 and were replaced; None likewise.
    """

    num_tokens: int
    num_documents: int
    num_bytes: int
    num_shards: int
    bytes_per_token: float
    median_length: float
    longest: int
    distinct_tokens: int
    unknown_tokens: int
    lost_bytes: int | None
    invalid_bytes: int | None
    samples: list[str]


def verify(storage: Storage, index: Index) -> Iterator[tuple[str, int]]:
    """Compare every file with its sha256; yields (name, bytes) of each that is whole.

    Raises:
        CorpusError: one is not.
    """
    for split in index.splits.values():
        files: list[tuple[ArrayFile, str]] = [(shard, index.dtype) for shard in split.shards]
        files += [(split.documents, "int64"), (split.checksums, "uint32")]
        for file, dtype in files:
            size = file.num_bytes(dtype)
            storage.check([(file, dtype)])
            path = storage.path(file, size)
            if sha256_of(path) != file.sha256:
                raise CorpusError(f"{path} is damaged: its sha256 is not the index's; {storage.remedy}")
            yield file.file, size
    read_tokenizer(storage, index)


def statistics(storage: Storage, name: str) -> SplitStatistics:
    """Return one split's statistics; reads all of it, so each page is held against its checksum and the vocabulary."""
    index = read_index(storage)
    split, tokenizer = Split(storage, index, name), read_tokenizer(storage, index)
    files = index.splits[name]
    path = storage.path(files.documents, files.documents.num_bytes("int64"))
    ends = load(path, files.documents, "int64", storage.remedy)
    lengths = np.diff(ends, prepend=0)
    if len(ends) == 0 or lengths.min() < 1 or ends[-1] != split.num_tokens:
        raise CorpusError(f"{path}: its documents do not follow each other to the end; {storage.remedy}")
    if index.vocab_size > LARGEST_ID + 1:
        raise CorpusError(
            f"{storage.address}/index.json has a vocabulary of {index.vocab_size:,}; at most {LARGEST_ID + 1:,}"
        )
    counts, closings = np.zeros(index.vocab_size, np.int64), 0
    for start in range(0, split.num_tokens, CHUNK):
        tokens = split.slice(start, start + CHUNK)
        counts += np.bincount(tokens, minlength=index.vocab_size)
        first, behind = np.searchsorted(ends, [start, start + CHUNK], side="right")
        closings += int((tokens[ends[first:behind] - start - 1] == index.end_of_document).sum())
    if closings != len(ends):
        raise CorpusError(f"{path}: {len(ends) - closings} documents do not end where it says; {storage.remedy}")
    begins = (ends - lengths)[np.linspace(0, len(ends) - 1, min(2, len(ends))).astype(int)]
    samples = [tokenizer.decode(split.slice(begin, begin + SAMPLE_TOKENS).tolist()) for begin in begins.tolist()]
    sizes = (split.num_bytes / split.num_tokens, float(np.median(lengths)), int(lengths.max()))
    numbers = (split.num_tokens, files.num_documents, split.num_bytes, len(files.shards))
    unknown = getattr(tokenizer, "unknown", None)
    num_unknown = int(counts[unknown]) if unknown is not None else 0
    loss = measured_loss(index, name) or {}
    distinct = int((counts > 0).sum())
    return SplitStatistics(*numbers, *sizes, distinct, num_unknown, loss.get("lost"), loss.get("invalid"), samples)


def measured_loss(index: Index, name: str) -> dict[str, int] | None:
    """Return how many bytes of a split's text (`of_bytes`) are `lost` or `invalid`; None: that was not measured."""
    made: Any = index.made
    losses = made.get("lost") if isinstance(made, dict) else None
    loss = losses.get(name) if isinstance(losses, dict) else None
    if not isinstance(loss, dict):
        return None
    found = {key: loss[key] for key in ("of_bytes", "lost", "invalid") if type(loss.get(key)) is int}
    return found if len(found) == 3 and min(found.values()) >= 0 else None


def describe_losses(index: Index) -> str:
    """Return how much of the text of both splits is not in the tokens."""
    losses = [measured_loss(index, name) for name in SPLITS]
    known = [loss for loss in losses if loss is not None]
    if len(known) < len(losses):
        return "how much of the text is not in the tokens was not measured when this corpus was prepared"
    lost, invalid, size = (sum(loss[key] for loss in known) for key in ("lost", "invalid", "of_bytes"))
    return describe_loss(lost, invalid, size)


def describe_unknown(index: Index, found: Mapping[str, SplitStatistics]) -> str | None:
    """Return how much the vocabulary lacks of a corpus whose losses were not measured, by the tokens that stand for it.

    Args:
        found: the statistics by split.

    Returns:
        A line above SAID_LOSS; None: below it, or the losses themselves are known.
    """
    if all(measured_loss(index, name) is not None for name in SPLITS):
        return None
    unknown, size = (sum(getattr(each, name) for each in found.values()) for name in ("unknown_tokens", "num_tokens"))
    share = unknown / max(size, 1)
    if share <= SAID_LOSS:
        return None
    line = f"{share:.3%} of the tokens stand for what the vocabulary does not have: {unknown:,} of {size:,}"
    return f"{line}; above the {MAX_LOSS:.0%} up to which a preparation takes it today" if share > MAX_LOSS else line


def describe(index: Index) -> list[tuple[str, str]]:
    """Yield (what, value) for people."""
    return [
        ("source", index.source),
        ("tokenizer", f"{index.tokenizer}, {index.vocab_size:,} tokens, end of document {index.end_of_document}"),
        ("stored as", f"{index.dtype}, shards of {index.shard_tokens:,} tokens"),
        ("text", describe_losses(index)),
        ("made", json.dumps(index.made)),
    ]
