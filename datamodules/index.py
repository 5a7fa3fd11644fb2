"""index.json: which files a prepared corpus consists of, and how it was made."""

import json
import re
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np

from core.errors import UserError

INDEX_VERSION = 2
SPLITS = ("train", "val")
DTYPES = ("uint16", "uint32")
HEADER_BYTES = 128  # of the .npy files that the writer makes; the same for any length, so that they can grow


class CorpusError(UserError):
    """A corpus on disk that cannot be trusted; says which file and why."""


@dataclass(frozen=True)
class ArrayFile:
    """A one-dimensional .npy file.

    Attributes:
        file: its name in the corpus' folder.
        length: number of elements.
        sha256: of the whole file.
    """

    file: str
    length: int
    sha256: str

    def __post_init__(self) -> None:
        check_name(self.file)

    def num_bytes(self, dtype: str) -> int:
        return HEADER_BYTES + self.length * np.dtype(dtype).itemsize


@dataclass(frozen=True)
class SplitIndex:
    """One split: a stream of tokens, cut into shards of Index.shard_tokens tokens each; the last may be shorter.

    Attributes:
        num_tokens: end-of-document tokens included.
        num_documents: how many documents, each closed by an end-of-document token.
        num_bytes: of their text, without what the tokens do not express.
        shards: the tokens, of type Index.dtype.
        documents: int64, where in the stream each document ends (its end-of-document token included).
        checksums: uint32, zlib.crc32 of each Index.page_tokens tokens; a page never spans two shards.
    """

    num_tokens: int
    num_documents: int
    num_bytes: int
    shards: list[ArrayFile]
    documents: ArrayFile
    checksums: ArrayFile


@dataclass(frozen=True)
class Index:
    """The corpus.

    Attributes:
        dtype: of the token ids, uint16 or uint32.
        vocab_size: every token id is below it.
        end_of_document: token that closes each document.
        shard_tokens: length of a shard, a multiple of page_tokens.
        page_tokens: how many tokens share a checksum.
        tokenizer: its name (`byte`, `bpe:16384`, ...).
        tokenizer_file: the file in the format of the `tokenizers` library; None: bytes need none.
        source: what the text is, in words.
        made: how: versions and settings.
        splits: train and val.
    """

    dtype: str
    vocab_size: int
    end_of_document: int
    shard_tokens: int
    page_tokens: int
    splits: dict[str, SplitIndex]
    tokenizer: str = "byte"
    tokenizer_file: str | None = None
    tokenizer_sha256: str | None = None
    source: str = ""
    made: dict[str, Any] = field(default_factory=dict)
    version: int = INDEX_VERSION

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that another corpus, in either split, does not have."""
        shards = [shard.sha256 for name in SPLITS for shard in self.splits[name].shards]
        return sha256(" ".join(shards).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        return json.dumps({"version": self.version, **asdict(self)}, indent=2) + "\n"


def parse_index(text: bytes, where: str) -> Index:
    """The index in an index.json.

    Args:
        text: the file's content.
        where: its address, for the messages.

    Raises:
        CorpusError: not JSON, of another version, or not consistent with itself.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{where} cannot be read: {error}") from error
    version = content.get("version") if isinstance(content, dict) else None
    if version != INDEX_VERSION:
        newer = isinstance(version, int) and version > INDEX_VERSION
        remedy = "use a newer checkout of this project" if newer else "delete its folder and prepare the corpus again"
        raise CorpusError(f"{where} has version {version!r}; this code reads version {INDEX_VERSION}: {remedy}")
    try:
        splits = {name: _split_index(content["splits"][name]) for name in SPLITS}
        index = Index(**{**content, "splits": splits})
        _check(index)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CorpusError(f"{where} is not a whole index: {type(error).__name__}: {error}") from error
    return index


def _split_index(content: dict[str, Any]) -> SplitIndex:
    arrays = {name: ArrayFile(**content[name]) for name in ("documents", "checksums")}
    return SplitIndex(**{**content, **arrays, "shards": [ArrayFile(**shard) for shard in content["shards"]]})


def check_name(file: str) -> None:
    """Raise ValueError unless it names a file in the corpus' own folder."""
    if file in ("", ".", "..") or set(file) & set("/\\\0"):
        raise ValueError(f"{file!r} is not the name of a file in its folder")


def _check_file(array: ArrayFile) -> None:
    check_name(array.file)
    if not re.fullmatch("[0-9a-f]{64}", str(array.sha256)):  # a cache calls its files by it
        raise ValueError(f"{array.file} has sha256 {array.sha256!r}, which is none")
    if type(array.length) is not int or array.length < 0:
        raise ValueError(f"{array.file} has length {array.length!r}")


def _check(index: Index) -> None:
    for split in index.splits.values():
        for array in (*split.shards, split.documents, split.checksums):
            _check_file(array)
    if index.tokenizer_file is not None:
        check_name(index.tokenizer_file)
    if index.dtype not in DTYPES:
        raise ValueError(f"dtype {index.dtype!r} is none of {', '.join(DTYPES)}")
    if index.vocab_size > np.iinfo(index.dtype).max + 1:
        raise ValueError(f"vocab_size {index.vocab_size} does not fit {index.dtype}")
    if index.end_of_document >= index.vocab_size:
        raise ValueError(f"end_of_document {index.end_of_document} is not below vocab_size {index.vocab_size}")
    if not index.end_of_document >= 0:
        raise ValueError(f"end_of_document {index.end_of_document} is negative")
    if index.page_tokens < 1 or index.shard_tokens < 1 or index.shard_tokens % index.page_tokens:
        raise ValueError(f"shard_tokens {index.shard_tokens} is no multiple of page_tokens {index.page_tokens}")
    for name, split in index.splits.items():
        whole, rest = divmod(split.num_tokens, index.shard_tokens)
        expected = [index.shard_tokens] * whole + ([rest] if rest else [])
        if [shard.length for shard in split.shards] != expected:
            raise ValueError(f"the shards of {name} do not add up to its {split.num_tokens} tokens")
        if split.checksums.length != -(-split.num_tokens // index.page_tokens):
            raise ValueError(f"{name} has {split.checksums.length} checksums, which is not one a page")
