"""index.json: which files a prepared corpus consists of, and how it was made."""

import json
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field

from core.errors import UserError, one_line
from core.untrusted import MIB, Untrusted, beyond, bound, parse_json

INDEX_VERSION = 2
SPLITS = ("train", "val")
DTYPES = ("uint16", "uint32")
INDEX_BYTES = 64 * MIB  # of an index.json that is read: some 300,000 shards
MAX_PAGES = 1 << 26  # of a split that is read, which holds a byte for each: 4.4e12 tokens in pages of 65,536
MAX_VOCABULARY = (1 << 24) + 1  # as of a tokenizer's file
HEADER_BYTES = 128  # of the .npy files that the writer makes; the same for any length, so that they can grow


Name = Annotated[str, Field(min_length=1, max_length=255)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**53)]
Length = Annotated[int, Field(ge=1, le=2**53)]


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

    __pydantic_config__ = ConfigDict(extra="forbid")

    file: Name
    length: Count
    sha256: Digest

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

    __pydantic_config__ = ConfigDict(extra="forbid")

    num_tokens: Count
    num_documents: Count
    num_bytes: Count
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

    __pydantic_config__ = ConfigDict(extra="forbid")

    dtype: str
    vocab_size: Length
    end_of_document: Count
    shard_tokens: Length
    page_tokens: Length
    splits: dict[Name, SplitIndex]
    tokenizer: Annotated[str, Field(max_length=4096)] = "byte"
    tokenizer_file: Name | None = None
    tokenizer_sha256: Digest | None = None
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
    """Return the index in an index.json.

    Args:
        text: the file's content.
        where: its address, for the messages.

    Raises:
        CorpusError: not JSON, of another version, or not consistent with itself.
    """
    try:
        content = parse_json(text, where)
        version = content.get("version") if isinstance(content, dict) else None
        if version != INDEX_VERSION:
            newer = isinstance(version, int) and version > INDEX_VERSION
            remedy = (
                "use a newer checkout of this project" if newer else "delete its folder and prepare the corpus again"
            )
            raise CorpusError(f"{where} has version {version!r}; this code reads version {INDEX_VERSION}: {remedy}")
        index: Index = parse_json(text, where, Index)
    except Untrusted as error:
        raise CorpusError(str(error)) from error
    try:
        index = replace(index, splits={name: index.splits[name] for name in SPLITS})
        _check(index, where)
    except KeyError as error:
        raise CorpusError(f"{where} is not a whole index: there is no split {error}") from error
    except ValueError as error:
        raise CorpusError(f"{where} is not a whole index: {one_line(error)}") from error
    return index


def check_name(file: str) -> None:
    """Raise ValueError unless it names a file in the corpus' own folder."""
    if file in ("", ".", "..") or set(file) & set("/\\\0"):
        raise ValueError(f"{file!r} is not the name of a file in its folder")


def _check(index: Index, where: str) -> None:
    """Hold the fields of an index against each other.

    Raises:
        ValueError: they cannot all be true.
        CorpusError: they go beyond a bound.
    """
    if index.tokenizer_file is not None:
        check_name(index.tokenizer_file)
    if index.dtype not in DTYPES:
        raise ValueError(f"dtype {index.dtype!r} is none of {', '.join(DTYPES)}")
    if index.vocab_size > np.iinfo(index.dtype).max + 1:
        raise ValueError(f"vocab_size {index.vocab_size} does not fit {index.dtype}")
    if index.vocab_size > bound(MAX_VOCABULARY):
        raise CorpusError(beyond(f"{where} has vocab_size {index.vocab_size:,}", MAX_VOCABULARY))
    if index.end_of_document >= index.vocab_size:
        raise ValueError(f"end_of_document {index.end_of_document} is not below vocab_size {index.vocab_size}")
    if index.shard_tokens % index.page_tokens:
        raise ValueError(f"shard_tokens {index.shard_tokens} is no multiple of page_tokens {index.page_tokens}")
    for name, split in index.splits.items():
        whole, rest = divmod(split.num_tokens, index.shard_tokens)
        lengths = [shard.length for shard in split.shards]
        last = [rest] if rest else []
        # Compared by their number first: a list of what num_tokens promises could be of any length.
        if len(lengths) != whole + len(last) or lengths != [index.shard_tokens] * whole + last:
            raise ValueError(f"the shards of {name} do not add up to its {split.num_tokens} tokens")
        if split.checksums.length != -(-split.num_tokens // index.page_tokens):
            raise ValueError(f"{name} has {split.checksums.length} checksums, which is not one a page")
        if split.checksums.length > bound(MAX_PAGES):
            raise CorpusError(beyond(f"{where} has {split.checksums.length:,} pages in {name}", MAX_PAGES))
        if split.documents.length != split.num_documents or split.num_documents > split.num_tokens:
            raise ValueError(f"{name} has {split.num_documents} documents, which its files do not have")
