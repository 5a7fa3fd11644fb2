"""Writes a prepared corpus: shards of one length, checksums, document ends, and the index last of all."""

import contextlib
import fcntl
import glob
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import numpy.typing as npt

from core.paths import behind_link
from core.untrusted import read_json
from datamodules.index import HEADER_BYTES, INDEX_BYTES, SPLITS, ArrayFile, Count, Index, SplitIndex
from datamodules.shards import sha256_of

PAGE_TOKENS = 1 << 16
SHARD_TOKENS = 1 << 26  # 128 MiB of uint16
PROGRESS, LOCK = "progress.json", "lock"
RANDOM_LETTERS = 8  # at the end of a name that tempfile makes
OLD_SECONDS = 3600  # after which a folder without a lock is nobody's


@dataclass(frozen=True)
class SplitProgress:
    """Says what of a split is safely on the disk; see SplitWriter."""

    num_tokens: Count = 0
    num_documents: Count = 0
    num_bytes: Count = 0
    lost: Count = 0
    invalid: Count = 0
    shards: list[ArrayFile] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """The content of progress.json, from which a preparation that was stopped goes on.

    Attributes:
        pieces: of the input that are safely written.
        splits: by name.
    """

    pieces: Count
    splits: dict[str, SplitProgress]


class GrowingArray:
    """A .npy file that is appended to; its header, of fixed size, is written when the length is known.

    Args:
        path: the file.
        dtype: of the elements.
        length: how much of an existing file stays; what lies beyond is cut off.
    """

    def __init__(self, path: Path, dtype: str, length: int = 0) -> None:
        self.path, self.dtype, self.length = path, np.dtype(dtype), length
        self._file: BinaryIO = path.open("r+b" if length else "w+b")
        self._file.truncate(HEADER_BYTES + length * self.dtype.itemsize)
        self._file.seek(0, os.SEEK_END)

    def append(self, values: npt.NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(values, self.dtype).data)
        self.length += len(values)

    def sync(self) -> None:
        """Put what was appended on disk: it survives a crash from here on."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> ArrayFile:
        """Write the header, and describe the file."""
        self._file.seek(0)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        assert self._file.tell() == HEADER_BYTES
        self.sync()
        self._file.close()
        return ArrayFile(self.path.name, self.length, sha256_of(self.path))

    def abandon(self) -> None:
        self._file.close()


class SplitWriter:
    """One split's files. Its state is small, so that a preparation can be stopped and go on.

    Args:
        folder: that of the corpus.
        name: train or val.
        dtype: of the tokens.
        shard_tokens: length of a shard.
        state: of an earlier writer whose files are still there.
    """

    def __init__(
        self, folder: Path, name: str, dtype: str, shard_tokens: int, state: "SplitProgress | None" = None
    ) -> None:
        state = state or SplitProgress()
        self.folder, self.name, self.dtype, self.shard_tokens = folder, name, dtype, shard_tokens
        self.page_tokens = min(PAGE_TOKENS, shard_tokens)
        self.num_tokens, self.num_bytes = state.num_tokens, state.num_bytes
        self.lost, self.invalid = state.lost, state.invalid
        self.shards = list(state.shards)
        rest = self.num_tokens - len(self.shards) * shard_tokens
        self.current = GrowingArray(self._shard_path(), dtype, rest) if rest else None
        self.documents = GrowingArray(folder / f"{name}.documents.npy", "int64", state.num_documents)
        pages = len(self.shards) * shard_tokens // self.page_tokens
        self.checksums = GrowingArray(folder / f"{name}.checksums.npy", "uint32", pages)

    def append(
        self, tokens: npt.NDArray[Any], ends: npt.NDArray[np.int64], num_bytes: int, lost: int = 0, invalid: int = 0
    ) -> None:
        """Add tokens.

        Args:
            tokens: end-of-document tokens included.
            ends: where among them documents end (position after the end-of-document token).
            num_bytes: of their text.
            lost: how many of those bytes belong to characters that the tokens do not express.
            invalid: how many of the others are no UTF-8, and were replaced.
        """
        self.lost, self.invalid = self.lost + lost, self.invalid + invalid
        self.documents.append(ends + self.num_tokens)
        self.num_bytes += num_bytes
        while len(tokens):
            if self.current is None:
                self.current = GrowingArray(self._shard_path(), self.dtype)
            piece, tokens = np.split(tokens, [self.shard_tokens - self.current.length])
            self.current.append(piece)
            self.num_tokens += len(piece)
            if self.current.length == self.shard_tokens:
                self._close_shard(self.current)

    def state(self) -> "SplitProgress":
        """Return what another writer goes on from; the files are safe on disk."""
        for array in (self.current, self.documents, self.checksums):
            if array is not None:
                array.sync()
        numbers = (self.num_tokens, self.documents.length, self.num_bytes, self.lost, self.invalid)
        return SplitProgress(*numbers, self.shards)

    def close(self) -> SplitIndex:
        if self.current is not None:
            self._close_shard(self.current)
        num_documents = self.documents.length
        documents, checksums = self.documents.close(), self.checksums.close()
        expressed = self.num_bytes - self.lost - self.invalid
        return SplitIndex(self.num_tokens, num_documents, expressed, self.shards, documents, checksums)

    def abandon(self) -> None:
        """Close the files as they are."""
        for array in (self.current, self.documents, self.checksums):
            if array is not None:
                array.abandon()

    def _shard_path(self) -> Path:
        return self.folder / f"{self.name}-{len(self.shards):05d}.npy"

    def _close_shard(self, shard: GrowingArray) -> None:
        self.shards.append(shard.close())
        tokens = np.load(shard.path, mmap_mode="r")
        pages = (tokens[start : start + self.page_tokens] for start in range(0, len(tokens), self.page_tokens))
        self.checksums.append(np.array([zlib.crc32(page.data) for page in pages], np.uint32))
        self.current = None


class CorpusWriter:
    """A whole corpus in a folder that is not yet the corpus: `finish` makes it one, atomically.

    Args:
        scratch: the folder to write in, beside the final one.
        description: fields of the Index that are known beforehand; at least vocab_size and end_of_document.
        shard_tokens: length of a shard, a multiple of PAGE_TOKENS.
    """

    def __init__(self, scratch: Path, description: dict[str, Any], shard_tokens: int = SHARD_TOKENS) -> None:
        assert shard_tokens % min(PAGE_TOKENS, shard_tokens) == 0
        self.scratch, self.description, self.shard_tokens = scratch, description, shard_tokens
        self.dtype = "uint16" if description["vocab_size"] <= 1 << 16 else "uint32"
        path = scratch / PROGRESS
        saved: Progress = read_json(path, Progress, INDEX_BYTES) if path.exists() else Progress(0, {})
        self.pieces = saved.pieces
        self.splits = {
            name: SplitWriter(scratch, name, self.dtype, shard_tokens, saved.splits.get(name)) for name in SPLITS
        }

    def checkpoint(self, pieces: int) -> None:
        """Note that so many pieces of the input are safely written; a writer in this folder goes on from there."""
        self.pieces = pieces
        progress = Progress(pieces, {name: split.state() for name, split in self.splits.items()})
        draft = self.scratch / f"{PROGRESS}.draft"
        draft.write_text(json.dumps(asdict(progress)))
        draft.replace(self.scratch / PROGRESS)

    def finish(self, folder: Path) -> Index:
        """Write the index and move everything to `folder`; a whole corpus that is there already stays."""
        splits = {name: split.close() for name, split in self.splits.items()}
        page_tokens = min(PAGE_TOKENS, self.shard_tokens)
        layout = {"dtype": self.dtype, "shard_tokens": self.shard_tokens, "page_tokens": page_tokens}
        index = Index(**{**layout, **self.description, "splits": splits})
        (self.scratch / PROGRESS).unlink(missing_ok=True)
        with (self.scratch / "index.json").open("w") as file:
            file.write(index.to_json())
            file.flush()
            os.fsync(file.fileno())
        self.scratch.chmod(0o755)
        try:
            self.scratch.rename(folder)  # atomic: a corpus is there whole or not at all
        except OSError:
            if not (folder / "index.json").exists():
                raise
        return index

    def abandon(self) -> None:
        for split in self.splits.values():
            split.abandon()


def write_corpus(
    folder: Path,
    documents: Iterable[tuple[str, bytes, npt.NDArray[Any]]],
    end_of_document: int,
    description: dict[str, Any],
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Write a corpus in one go, all or nothing; when two processes write the same one, the first one's stays.

    Args:
        folder: where the corpus will be.
        documents: (split, text, tokens) of each document.
        end_of_document: token appended to each document.
        description: what else the index should hold (tokenizer, vocab_size, source, ...).
        shard_tokens: length of a shard.
    """
    folder = behind_link(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_left_over(folder)
    with _own_scratch(folder) as scratch:
        writer = CorpusWriter(scratch, {**description, "end_of_document": end_of_document}, shard_tokens)
        try:
            for name, text, tokens in documents:
                closed = np.append(tokens, np.array(end_of_document, tokens.dtype))
                writer.splits[name].append(closed, np.array([len(closed)]), len(text))
            (scratch / LOCK).unlink()  # no part of the corpus; a folder without one is left alone for OLD_SECONDS
            writer.finish(folder)
        finally:
            writer.abandon()


@contextmanager
def _own_scratch(folder: Path) -> Iterator[Path]:
    """Give a folder beside the corpus' that goes at the end, with a lock for as long as this process writes to it."""
    scratch, lock = _locked_folder(folder)
    with lock:
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _locked_folder(folder: Path) -> tuple[Path, TextIO]:
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        lock = (scratch / LOCK).open("w")
        # Who removes what was left over may have taken it for that, right between the two calls.
        if _is_ours(lock) and (scratch / LOCK).exists():
            return scratch, lock
        lock.close()


def _is_ours(lock: TextIO) -> bool:
    try:
        return _take(lock)
    except OSError:
        return True  # a file system without locks, on which nobody removes anything


def remove_left_over(folder: Path) -> None:
    """Remove what killed processes left behind while they wrote the corpus of this folder with `write_corpus`."""
    for scratch in folder.parent.glob(f".{glob.escape(folder.name)}.{'?' * RANDOM_LETTERS}"):
        # Where there is no lock, a process may be about to make it; or an earlier version of this module wrote it.
        with contextlib.suppress(OSError):
            if (scratch / LOCK).exists():
                with (scratch / LOCK).open("r+") as lock:
                    if _take(lock):
                        shutil.rmtree(scratch)
            elif time.time() - scratch.stat().st_mtime > OLD_SECONDS:
                shutil.rmtree(scratch)


def _take(file: TextIO) -> bool:
    """Take the lock for as long as the file is open; False: another process has it. OSError: there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
