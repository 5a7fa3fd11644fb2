"""Tokenizes in several processes; results come in the order of the input, whatever their number."""

import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from core.errors import UserError
from core.signals import held_back, ignore_stop_signals
from datamodules.index import SPLITS
from datamodules.tokenizers import Tokenizer

UNIT_BYTES, UNIT_PIECES = 1 << 20, 256  # what one process gets at a time


class SplitPiece(NamedTuple):
    """A piece of a document that goes into this split; `begins` and `ends` are true where the document does."""

    split: str
    text: bytes
    ends: bool
    begins: bool = True


class Encoded(NamedTuple):
    """Carries what SplitWriter.append takes, and which characters were lost, with how often."""

    tokens: npt.NDArray[Any]
    ends: npt.NDArray[np.int64]
    num_bytes: int
    lost: int
    invalid: int
    characters: Counter[str]


class WorkerDied(UserError):
    """A process that tokenizes is gone."""


Unit = list[SplitPiece]
_tokenizer: Tokenizer | None = None  # a worker process' own


def units(pieces: Iterable[SplitPiece]) -> Iterator[Unit]:
    """Yield neighbouring pieces together: enough work for a process, little enough for its memory."""
    unit: Unit = []
    size = 0
    for piece in pieces:
        unit.append(piece)
        size += len(piece.text)
        if size >= UNIT_BYTES or len(unit) == UNIT_PIECES:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def encode(unit: Unit, tokenizer: Tokenizer) -> dict[str, Encoded]:
    """Return the tokens of a unit, split by split."""
    texts = [piece.text for piece in unit]
    arrays = tokenizer.encode_batch(texts, [not piece.begins for piece in unit])
    losses = tokenizer.measure(texts, arrays)
    out = {}
    for name in SPLITS:
        here = [(piece, tokens) for piece, tokens in zip(unit, arrays, strict=True) if piece.split == name]
        if here:
            closing = np.array([tokenizer.end_of_document], here[0][1].dtype)
            ends = np.cumsum([len(tokens) + piece.ends for piece, tokens in here])
            parts = [part for piece, tokens in here for part in ((tokens, closing) if piece.ends else (tokens,))]
            kept = ends[[piece.ends for piece, _ in here]].astype(np.int64)
            size = sum(len(piece.text) for piece, _ in here)
            loss = [loss for piece, loss in zip(unit, losses, strict=True) if piece.split == name]
            lost, invalid = sum(each.lost for each in loss), sum(each.invalid for each in loss)
            characters: Counter[str] = Counter()
            for each in loss:
                characters.update(dict(each.characters))
            out[name] = Encoded(np.concatenate(parts), kept, size, lost, invalid, characters)
    return out


def encode_all(work: Iterable[Unit], tokenizer: Tokenizer, processes: int) -> Iterator[tuple[Unit, dict[str, Encoded]]]:
    """Yield (unit, its tokens), in order; at most a few units a process are held."""
    if processes == 1:
        yield from ((unit, encode(unit, tokenizer)) for unit in work)
        return
    # spawn: a fork would take threads' locks along, and the tokenizers library has threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_start, initargs=(tokenizer,)) as pool:
        pending: deque[tuple[Unit, Future[dict[str, Encoded]]]] = deque()
        try:
            for unit in work:
                with held_back():  # a process is started here when there is work for it
                    future = pool.submit(_encode, unit)
                pending.append((unit, future))
                while pending and (len(pending) > 4 * processes or pending[0][1].done()):
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        except BrokenProcessPool as error:
            died = f"one of {processes} processes died, for want of memory perhaps"
            raise WorkerDied(
                f"{died}; the same command goes on from where it was, with processes=1 in less memory"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start(tokenizer: Tokenizer) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _tokenizer = tokenizer
    ignore_stop_signals()


def _encode(unit: Unit) -> dict[str, Encoded]:
    assert _tokenizer is not None
    return encode(unit, _tokenizer)
