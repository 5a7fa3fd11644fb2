"""Reads a prepared corpus: the tokens of a split as one stream, memory-mapped, each page verified once."""

import hashlib
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.index import ArrayFile, CorpusError, Index
from datamodules.storage import LocalFolder, Storage, Tokens, load, read_index


class Split:
    """One split's tokens; shards are mapped on first use. Picklable: data-loader workers map their own.

    What cannot be trusted is never handed out. Compared are here sizes, and the headers of files on this machine; a
    shard's header when it is mapped; and each page of Index.page_tokens tokens, with its checksum and the vocabulary,
    when it is read for the first time.

    Args:
        storage: where the files are.
        index: of the corpus.
        name: train or val.

    Raises:
        CorpusError: here or in any read: names the file and what is wrong with it.
    """

    def __init__(self, storage: Storage, index: Index, name: str) -> None:
        self.storage, self.index, self.name = storage, index, name
        self.files = index.splits[name]
        self.num_tokens, self.num_bytes = self.files.num_tokens, self.files.num_bytes
        storage.check([*((shard, index.dtype) for shard in self.files.shards), (self.files.checksums, "uint32")])
        self._forget()

    def _forget(self) -> None:
        self._shards: dict[int, Tokens] = {}
        self._checksums: Tokens | None = None
        self._verified = bytearray(self.files.checksums.length)  # a byte for each page, 1 once it is verified

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_shards", "_checksums", "_verified")
        return {name: value for name, value in self.__dict__.items() if name not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def num_samples(self, seq_len: int) -> int:
        """Return how many windows of seq_len + 1 tokens, each starting seq_len after the last."""
        return max(0, (self.num_tokens - 1) // seq_len)

    def read(self, samples: npt.NDArray[np.int64], seq_len: int) -> npt.NDArray[np.int64]:
        """Return the windows of the given numbers, [samples, seq_len + 1]."""
        out = np.empty((len(samples), seq_len + 1), np.int64)
        for row, sample in zip(out, samples.tolist(), strict=True):
            self._copy(sample * seq_len, row)
        return out

    def slice(self, start: int, stop: int) -> Tokens:
        """Return the tokens from `start` to before `stop`, in memory."""
        out = np.empty(max(0, min(stop, self.num_tokens) - start), self.index.dtype)
        self._copy(start, out)
        return out

    def head(self, num_tokens: int) -> Tokens:
        """Return the first ones, in memory; of shards that have to be fetched, one is needed at a time."""
        size, stop = self.index.shard_tokens, min(num_tokens, self.num_tokens)
        pieces = []
        for start in range(0, stop, size):
            self.keep([(start, min(start + size, stop))])
            pieces.append(self.slice(start, min(start + size, stop)))
        return np.concatenate(pieces)

    @property
    def tokens(self) -> Tokens:
        """Return all tokens [num_tokens], in memory: for small corpora."""
        return self.slice(0, self.num_tokens)

    def keep(self, ranges: list[tuple[int, int]]) -> None:
        """Tell the storage that tokens [start, stop) of these ranges are needed, in this order, and no others."""
        size = self.index.shard_tokens
        needed = dict.fromkeys(shard for start, stop in ranges for shard in range(start // size, -(-stop // size)))
        self._shards = {shard: tokens for shard, tokens in self._shards.items() if shard in needed}
        checksums = (self.files.checksums, self.files.checksums.num_bytes("uint32"))
        self.storage.keep([checksums, *(self._sized(self.files.shards[shard]) for shard in needed)])

    def _copy(self, start: int, out: Tokens) -> None:
        """Fill `out` with the tokens from `start` on, over as many shards as it takes."""
        done = 0
        while done < len(out):
            shard, offset = divmod(start + done, self.index.shard_tokens)
            tokens = self._shards.get(shard)
            if tokens is None:
                tokens = self._map(shard)
            piece = tokens[offset : offset + len(out) - done]
            first = (start + done) // self.index.page_tokens
            last = (start + done + len(piece) - 1) // self.index.page_tokens
            while (page := self._verified.find(0, first, last + 1)) >= 0:
                self._verify(page, tokens, shard)
            out[done : done + len(piece)] = piece
            done += len(piece)

    def _map(self, shard: int) -> Tokens:
        file = self.files.shards[shard]
        tokens = load(self.storage.path(*self._sized(file)), file, self.index.dtype, self.storage.remedy)
        self._shards[shard] = tokens
        return tokens

    def _verify(self, page: int, tokens: Tokens, shard: int) -> None:
        if self._checksums is None:
            file = self.files.checksums
            path = self.storage.path(file, file.num_bytes("uint32"))
            if sha256_of(path) != file.sha256:
                raise CorpusError(f"{path} is damaged: its sha256 is not the index's; {self.storage.remedy}")
            self._checksums = load(path, file, "uint32", self.storage.remedy)
        start = page * self.index.page_tokens - shard * self.index.shard_tokens
        content = tokens[start : start + self.index.page_tokens]
        file = self.files.shards[shard]
        where = f"{file.file}, tokens {start} to {start + len(content) - 1}"
        if zlib.crc32(content.data) != self._checksums[page]:
            raise CorpusError(f"{where}: damaged, the checksum is not the index's; {self.storage.remedy}")
        if (largest := int(content.max())) >= self.index.vocab_size:
            valid = f"beyond the vocabulary of {self.index.vocab_size}"
            raise CorpusError(f"{where}: token {largest} is {valid}; {self.storage.remedy}")
        self._verified[page] = 1

    def _sized(self, shard: ArrayFile) -> tuple[ArrayFile, int]:
        return shard, shard.num_bytes(self.index.dtype)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_split(corpus: Storage | Path, name: str) -> Split:
    """Return the named split (train or val) of a prepared corpus."""
    storage = LocalFolder(corpus) if isinstance(corpus, Path) else corpus
    return Split(storage, read_index(storage), name)
