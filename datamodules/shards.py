"""A tokenized corpus on disk: flat files of token ids, and an index.json that describes them."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core.errors import UserError

INDEX_VERSION = 1
SPLITS = ("train", "val")


class CorpusError(UserError):
    """A corpus on disk that cannot be trusted; says which file and why."""


class Split:
    """One split's tokens, memory-mapped on first use; picklable, so that data-loader workers open their own.

    Args:
        path: file of token ids.
        dtype: their NumPy type.
        num_tokens: how many there are.
        num_bytes: how many bytes of text they stand for.

    Raises:
        CorpusError: the file is missing, or not as long as the index says.
    """

    def __init__(self, path: Path, dtype: str, num_tokens: int, num_bytes: int) -> None:
        self.path, self.dtype, self.num_tokens, self.num_bytes = path, np.dtype(dtype), num_tokens, num_bytes
        expected = num_tokens * self.dtype.itemsize
        actual = path.stat().st_size if path.exists() else None
        if actual != expected:
            found = "is missing" if actual is None else f"has {actual} bytes"
            raise CorpusError(f"{path} {found}, its index says {expected}; delete {path.parent} to prepare it again")
        self._tokens: npt.NDArray[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokens": None}

    @property
    def tokens(self) -> npt.NDArray[Any]:
        """All token ids [num_tokens]; read-only."""
        if self._tokens is None:
            self._tokens = np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.num_tokens,))
        return self._tokens

    def num_samples(self, seq_len: int) -> int:
        """How many windows of seq_len + 1 tokens, each starting seq_len after the last."""
        return max(0, (self.num_tokens - 1) // seq_len)

    def read(self, samples: npt.NDArray[np.int64], seq_len: int) -> npt.NDArray[np.int64]:
        """The windows of the given numbers, [samples, seq_len + 1]."""
        return np.stack([self.tokens[i * seq_len : i * seq_len + seq_len + 1] for i in samples]).astype(np.int64)


def read_index(folder: Path) -> dict[str, Any]:
    """The corpus' description.

    Raises:
        CorpusError: there is none, it is not JSON, or a newer version of this project wrote it.
    """
    path = folder / "index.json"
    try:
        index: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path} cannot be read: {error}") from error
    if index.get("version") != INDEX_VERSION:
        raise CorpusError(f"{path} has version {index.get('version')!r}; this code reads version {INDEX_VERSION}")
    return index


def open_split(folder: Path, name: str) -> Split:
    """The named split (train or val) of a prepared corpus."""
    index = read_index(folder)
    entry = index["splits"][name]
    return Split(folder / entry["file"], index["dtype"], entry["num_tokens"], entry["num_bytes"])


def write_corpus(
    folder: Path,
    documents: Iterable[tuple[str, bytes, npt.NDArray[np.uint16]]],
    end_of_document: int,
    description: dict[str, Any],
) -> None:
    """Write shards and index, all or nothing; when two processes write the same corpus, the first one's stays.

    Args:
        folder: where the corpus will be.
        documents: (split, text, tokens) of each document.
        end_of_document: token appended to each document.
        description: what else the index should hold (tokenizer, vocab_size, source, ...).
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        splits = {name: {"file": f"{name}.bin", "num_tokens": 0, "num_bytes": 0, "num_documents": 0} for name in SPLITS}
        hashes = {name: hashlib.sha256() for name in SPLITS}
        with ExitStack() as stack:
            files = {name: stack.enter_context((scratch / f"{name}.bin").open("wb")) for name in SPLITS}
            for name, text, tokens in documents:
                data = np.append(tokens, np.uint16(end_of_document)).tobytes()
                files[name].write(data)
                hashes[name].update(data)
                entry: dict[str, Any] = splits[name]
                entry["num_tokens"] += len(tokens) + 1
                entry["num_bytes"] += len(text)
                entry["num_documents"] += 1
            for name, file in files.items():
                file.flush()
                os.fsync(file.fileno())
                splits[name]["sha256"] = hashes[name].hexdigest()
        index = {"version": INDEX_VERSION, "dtype": "uint16", **description, "splits": splits}
        (scratch / "index.json").write_text(json.dumps(index, indent=2) + "\n")
        scratch.chmod(0o755)
        try:
            scratch.rename(folder)  # atomic: a corpus is there whole or not at all
        except OSError:
            if not (folder / "index.json").exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
