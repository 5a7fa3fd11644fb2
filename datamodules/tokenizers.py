"""Text to token ids and back."""

from hashlib import sha256
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from datamodules.index import CorpusError, Index
from datamodules.storage import Storage

Tokens = npt.NDArray[Any]


class Tokenizer(Protocol):
    """What corpora are made with, and what a text sample is printed with."""

    name: str
    vocab_size: int
    end_of_document: int

    def encode(self, text: bytes) -> Tokens: ...

    def encode_batch(self, texts: list[bytes]) -> list[Tokens]: ...

    def decode(self, tokens: list[int]) -> str:
        """A document's end becomes a form feed, what is no valid text the replacement character."""
        ...


class ByteTokenizer:
    """One token a byte (ids 0 to 255), and an end-of-document token (256). Needs no vocabulary file."""

    name = "byte"
    vocab_size = 257
    end_of_document = 256

    def encode(self, text: bytes) -> Tokens:
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)

    def encode_batch(self, texts: list[bytes]) -> list[Tokens]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: list[int]) -> str:
        return b"".join(b"\f" if token >= 256 else bytes([token]) for token in tokens).decode("utf-8", "replace")


class FileTokenizer:
    """A tokenizer in the format of Hugging Face's `tokenizers`; bytes that are no UTF-8 become U+FFFD before.

    Args:
        content: of a tokenizer.json.
        name: as the index has it.
        end_of_document: the id of that token.

    Raises:
        CorpusError: the content cannot be read, or the library is not there.
    """

    def __init__(self, content: bytes, name: str, end_of_document: int) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ModuleNotFoundError as error:
            raise CorpusError("tokenizers is not installed: pip install -r requirements-data.txt") from error
        try:
            self._library = Library.from_str(content.decode())
        except Exception as error:  # the library raises nothing more precise
            raise CorpusError(f"the tokenizer {name} cannot be read: {error}") from error
        self._library.encode_special_tokens = True  # a text that spells out such a token gets its letters
        self.content, self.name, self.end_of_document = content, name, end_of_document
        self.vocab_size = 1 + max(self._library.get_vocab(with_added_tokens=True).values())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.content, self.name, self.end_of_document)

    def encode(self, text: bytes) -> Tokens:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[bytes]) -> list[Tokens]:
        strings = [text.decode("utf-8", "replace") for text in texts]
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        # No special tokens: documents are closed by the writer.
        encoded = self._library.encode_batch_fast(strings, add_special_tokens=False)
        return [np.array(encoding.ids, dtype) for encoding in encoded]

    def decode(self, tokens: list[int]) -> str:
        pieces: list[list[int]] = [[]]
        for token in tokens:
            if token == self.end_of_document:
                pieces.append([])
            else:
                pieces[-1].append(token)
        return "\f".join(self._library.decode(piece, skip_special_tokens=False) for piece in pieces)


class NumberTokenizer:
    """For data that is no text: ids are printed as numbers."""

    name = "numbers"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.end_of_document = vocab_size - 1

    def encode(self, text: bytes) -> Tokens:
        return np.frombuffer(text, dtype=np.uint8).astype(np.int64) % self.vocab_size

    def encode_batch(self, texts: list[bytes]) -> list[Tokens]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


def read_tokenizer(storage: Storage, index: Index) -> Tokenizer:
    """The tokenizer that the corpus was made with.

    Raises:
        CorpusError: its file is not what the index says.
    """
    if index.tokenizer_file is None:
        return ByteTokenizer()
    content = storage.read(index.tokenizer_file)
    if sha256(content).hexdigest() != index.tokenizer_sha256:
        where = f"{storage.address}/{index.tokenizer_file}"
        raise CorpusError(f"{where} is damaged: its sha256 is not the index's; {storage.remedy}")
    tokenizer = FileTokenizer(content, index.tokenizer, index.end_of_document)
    if tokenizer.vocab_size != index.vocab_size:
        found = f"{tokenizer.vocab_size} tokens, the index says {index.vocab_size}"
        raise CorpusError(f"{storage.address}/{index.tokenizer_file} has {found}; {storage.remedy}")
    return tokenizer
