"""Text to token ids and back."""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from core.console import silent_if_it_fails
from core.errors import UserError, one_line, require
from datamodules import tokenizer_file
from datamodules.expression import NONE, Loss, compare
from datamodules.index import CorpusError, Index
from datamodules.storage import Storage

Tokens = npt.NDArray[Any]


class Tokenizer(Protocol):
    """Makes the tokens of corpora, and prints those of a text sample."""

    name: str
    vocab_size: int
    end_of_document: int

    def encode(self, text: bytes) -> Tokens: ...

    def encode_batch(self, texts: list[bytes], continued: Sequence[bool] = ()) -> list[Tokens]:
        """Encode several texts.

        Args:
            texts: documents, or parts of them.
            continued: of each, whether it goes on a text rather than begins one; empty: none does.
        """
        ...

    def measure(self, texts: list[bytes], arrays: list[Tokens]) -> list[Loss]:
        """Say of each text what its tokens do not express."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """Return the text of ids: a document's end is a form feed, what is no valid text the replacement character."""
        ...


class Vocabulary(NamedTuple):
    """Says what token ids stand for, to be held against another; in words it is its name.

    Attributes:
        name: of the tokenizer.
        content: of its file; None: the name says all.
        size: number of tokens.
    """

    name: str
    content: Any
    size: int

    def __str__(self) -> str:
        return self.name


class ByteTokenizer:
    """One token a byte (ids 0 to 255), and an end-of-document token (256). Needs no vocabulary file."""

    name = "byte"
    vocab_size = 257
    end_of_document = 256

    def encode(self, text: bytes) -> Tokens:
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)

    def encode_batch(self, texts: list[bytes], continued: Sequence[bool] = ()) -> list[Tokens]:
        return [self.encode(text) for text in texts]

    def measure(self, texts: list[bytes], arrays: list[Tokens]) -> list[Loss]:
        return [NONE] * len(texts)

    def decode(self, tokens: list[int]) -> str:
        return b"".join(b"\f" if token >= 256 else bytes([token]) for token in tokens).decode("utf-8", "replace")


class SpelledEnd(UserError):
    """A text from which the tokenizer makes the token that ends documents, whatever is done."""


class FileTokenizer:
    """A tokenizer in the format of Hugging Face's `tokenizers`; bytes that are no UTF-8 become U+FFFD before.

    Nothing but vocabulary, merges, normalization and decoder count of its file: see tokenizer_file.py.

    Args:
        content: of a tokenizer.json.
        name: as the index has it.
        end_of_document: the id of that token.

    Raises:
        CorpusError: the content cannot be read or passes a bound, or the library is not there.
    """

    def __init__(self, content: bytes, name: str, end_of_document: int) -> None:
        try:
            self.library = tokenizer_file.load_library(content, end_of_document)
        except ModuleNotFoundError as error:
            raise CorpusError("tokenizers is not installed: pip install -r requirements-data.txt") from error
        except tokenizer_file.BadTokenizer as error:
            raise CorpusError(f"the tokenizer {name}: {error}") from error
        self.content, self.name, self.end_of_document = content, name, end_of_document
        self.vocab_size = tokenizer_file.vocabulary_size(self.library)
        self.unknown = tokenizer_file.unknown_token(self.library)
        self._watched = tokenizer_file.measured_growth(self.library)
        self._continuing: Any = None  # made when it is needed, for documents of several pieces

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.content, self.name, self.end_of_document)

    def encode(self, text: bytes) -> Tokens:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[bytes], continued: Sequence[bool] = ()) -> list[Tokens]:
        strings = [text.decode("utf-8", "replace") for text in texts]
        goes_on = list(continued) or [False] * len(strings)
        found: list[Tokens] = [np.empty(0)] * len(strings)
        for kind in set(goes_on):
            places = [place for place, each in enumerate(goes_on) if each == kind]
            for place, tokens in zip(places, self._encode([strings[place] for place in places], kind), strict=True):
                found[place] = tokens
        return found

    def measure(self, texts: list[bytes], arrays: list[Tokens]) -> list[Loss]:
        known = arrays if self.unknown is None else [array[array != self.unknown] for array in arrays]
        decoded = self.library.decode_batch([array.tolist() for array in known], skip_special_tokens=False)
        return [compare(text, string) for text, string in zip(texts, decoded, strict=True)]

    def _encode(self, strings: list[str], continued: bool) -> list[Tokens]:
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        arrays = [np.array(ids, dtype) for ids in self._ids(strings, continued)]
        for place, array in enumerate(arrays):
            if (array == self.end_of_document).any():
                arrays[place] = np.array(self._letters_of_end(strings[place], continued), dtype)
        return arrays

    def _ids(self, strings: list[str], continued: bool) -> list[list[int]]:
        if self._watched:
            self._say_which(tokenizer_file.check_growth, self.library, strings)
        # No special tokens: documents are closed by the writer.
        encoded = self._say_which(self._library_for(continued).encode_batch_fast, strings, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def _say_which(self, function: Any, *arguments: Any, **named: Any) -> Any:
        try:
            with silent_if_it_fails():
                return function(*arguments, **named)
        # The library's panics are no Exceptions; a regular expression without end is one.
        except BaseException as error:
            if isinstance(error, tokenizer_file.BadTokenizer) or type(error).__name__ == "PanicException":
                raise CorpusError(f"the tokenizer {self.name}: {one_line(error)}") from error
            raise

    def _library_for(self, continued: bool) -> Any:
        if not continued:
            return self.library
        if self._continuing is None:
            self._continuing = tokenizer_file.without_prefix(self.library)
        return self._continuing

    def _letters_of_end(self, string: str, continued: bool) -> list[int]:
        """Return the ids of a text in which the end-of-document token is spelled out: it is cut within each.

        Raises:
            SpelledEnd: the token comes from other letters than its own, or from one alone.
        """
        token = str(self.library.id_to_token(self.end_of_document))
        first, *others = string.split(token)
        parts = [first + token[:1] * bool(others), *(token[1:] + other + token[:1] for other in others[:-1])]
        parts += [token[1:] + others[-1]] if others else []
        ids = [self._ids([part], continued or place > 0)[0] for place, part in enumerate(parts)]
        together = [token for part in ids for token in part]
        if self.end_of_document in together:
            raise SpelledEnd(
                f"end_of_document={token!r} is not valid: {self.name} makes it of ordinary text too, "
                f"which would end documents amid them; name another token"
            )
        return together

    def decode(self, tokens: list[int]) -> str:
        pieces: list[list[int]] = [[]]
        for token in tokens:
            if token == self.end_of_document:
                pieces.append([])
            else:
                pieces[-1].append(token)
        return "\f".join(self.library.decode(piece, skip_special_tokens=False) for piece in pieces)


class NumberTokenizer:
    """Prints ids as numbers, for data that is no text."""

    name = "numbers"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.end_of_document = vocab_size - 1

    def encode(self, text: bytes) -> Tokens:
        return np.frombuffer(text, dtype=np.uint8).astype(np.int64) % self.vocab_size

    def encode_batch(self, texts: list[bytes], continued: Sequence[bool] = ()) -> list[Tokens]:
        return [self.encode(text) for text in texts]

    def measure(self, texts: list[bytes], arrays: list[Tokens]) -> list[Loss]:
        return [NONE] * len(texts)

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


def tokens_of(prompt: str, tokenizer: Tokenizer, field: str = "prompt") -> list[int]:
    """Return the prompt's token ids; none of an empty text.

    Args:
        field: the name of the setting that holds the prompt, for the message.

    Raises:
        ConfigError: the run's data is numbers, and the prompt is not.
    """
    if not isinstance(tokenizer, NumberTokenizer):
        tokens: list[int] = tokenizer.encode(prompt.encode("utf-8", "surrogateescape")).tolist()
        return tokens
    words = prompt.split()
    numbers = [int(word) for word in words if word.isascii() and word.isdigit() and int(word) < tokenizer.vocab_size]
    valid = f"numbers from 0 to {tokenizer.vocab_size - 1}, as {field}='3 1 4': this run's data is no text"
    require(bool(words) and len(numbers) == len(words), field, prompt, valid)
    return numbers


def read_tokenizer(storage: Storage, index: Index) -> Tokenizer:
    """Return the tokenizer that the corpus was made with.

    Raises:
        CorpusError: its file is not what the index says.
    """
    if index.tokenizer_file is None:
        return ByteTokenizer()
    content = storage.read(index.tokenizer_file, tokenizer_file.LARGEST_FILE)
    if sha256(content).hexdigest() != index.tokenizer_sha256:
        where = f"{storage.address}/{index.tokenizer_file}"
        raise CorpusError(f"{where} is damaged: its sha256 is not the index's; {storage.remedy}")
    tokenizer = FileTokenizer(content, index.tokenizer, index.end_of_document)
    if tokenizer.vocab_size != index.vocab_size:
        found = f"{tokenizer.vocab_size} tokens, the index says {index.vocab_size}"
        raise CorpusError(f"{storage.address}/{index.tokenizer_file} has {found}; {storage.remedy}")
    return tokenizer
