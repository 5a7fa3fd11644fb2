"""Trains a byte-level BPE, and finds tokenizers that exist already."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from core.errors import ConfigError, InvalidValue, one_line, require
from datamodules.preparation.optional import import_optional
from datamodules.tokenizer_file import LARGEST_FILE, BadTokenizer, load_library
from datamodules.tokenizer_folder import FILE, usual_end
from datamodules.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer

END_OF_DOCUMENT = "<|endoftext|>"
USUAL_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
TRAINING_BYTES = 100_000_000  # of text, from the beginning of the training split; more hardly moves the vocabulary
SMALLEST = 257  # every byte, and the end of a document
LONG_WORD = re.compile(r"\S{1024}|\s{1024}")
LARGEST = 1 << 20  # of what is trained here; a larger one comes as a tokenizer.json


def wanted_size(tokenizer: str) -> int:
    """Return the size that `bpe:16384` asks for.

    Raises:
        ConfigError: no number, or one too small or too large.
    """
    size = tokenizer.removeprefix("bpe:")
    valid = f"bpe:N with N >= {SMALLEST}, and at most {LARGEST:,} (a larger one comes as a tokenizer.json)"
    is_number = size.isascii() and size.isdecimal() and len(size) <= 20  # int() takes digits of any script
    require(is_number and SMALLEST <= int(size) <= LARGEST, "tokenizer", tokenizer, valid)
    return int(size)


def train_bpe(texts: Iterable[bytes], vocab_size: int) -> bytes:
    """Yield the tokenizer.json of a byte-level BPE (as GPT-2's), the same for the same texts.

    Args:
        texts: read until TRAINING_BYTES.
        vocab_size: bytes and the end-of-document token included; a small text may not have so many pairs.
    """
    library = import_optional("tokenizers", "tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def some() -> Iterable[str]:
        seen = 0
        for text in texts:
            if seen >= TRAINING_BYTES:
                return
            seen += len(text)
            yield from _without_long_words(text.decode("utf-8", "replace"))

    tokenizer.train_from_iterator(some(), trainer)
    return str(tokenizer.to_str(pretty=True)).encode()


def _without_long_words(text: str) -> Iterator[str]:
    """Yield the text, cut within runs without a space (or of spaces alone): the library takes their square in time."""
    start = 0
    for run in LONG_WORD.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    if start < len(text):
        yield text[start:]


def find_tokenizer(name: str) -> bytes | None:
    """Return the tokenizer.json of `PATH`, the file or its folder, or of `hf:NAME`; None: `byte` needs none.

    Raises:
        ConfigError: there is none.
    """
    if name == "byte":
        return None
    if name.startswith("hf:"):
        library = import_optional("tokenizers", "tokenizers")
        try:
            return str(library.Tokenizer.from_pretrained(name.removeprefix("hf:")).to_str(pretty=True)).encode()
        except Exception as error:  # network, no such repository, no tokenizer in it: the library's words say which
            raise InvalidValue("tokenizer", name, one_line(f"{type(error).__name__}: {error}")) from error
    try:
        path = Path(name) / FILE if Path(name).is_dir() else Path(name)
        valid = f"byte, bpe:SIZE, hf:NAME, or the path of a {FILE} or of a folder with one"
        require(path.is_file(), "tokenizer", name, valid)
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raised = f"at most {LARGEST_FILE:,} are read (LARGEST_FILE in datamodules/tokenizer_file.py raises it)"
            raise InvalidValue("tokenizer", name, f"it has {size:,} bytes; {raised}")
        return path.read_bytes()
    except OSError as error:
        raise InvalidValue("tokenizer", name, f"cannot be read ({error.strerror})") from error


def make_tokenizer(content: bytes | None, name: str, end_of_document: str | None) -> Tokenizer:
    """Return the tokenizer of this content.

    Args:
        content: of a tokenizer.json; None: bytes.
        name: goes into the index; that of a folder says where transformers has noted which token ends a text.
        end_of_document: the token that closes documents; None: the folder's, or else the first of USUAL_ENDS that there
            is.

    Raises:
        ConfigError: it has no such token.
    """
    if content is None:
        require(end_of_document is None, "end_of_document", end_of_document, "null: tokenizer=byte has its own")
        return ByteTokenizer()
    import_optional("tokenizers", "tokenizers")
    try:
        library = load_library(content)
    except BadTokenizer as error:
        raise InvalidValue("tokenizer", name, str(error)) from error
    vocabulary = library.get_vocab(with_added_tokens=True)
    if end_of_document is None and Path(name).is_dir():
        end_of_document = usual_end(Path(name), library, "tokenizer")
    candidates = USUAL_ENDS if end_of_document is None else (end_of_document,)
    found = next((token for token in candidates if token in vocabulary), None)
    if found is None:
        tried = "" if end_of_document else f"; none of {', '.join(USUAL_ENDS)} is"
        raise ConfigError("end_of_document", end_of_document, f"a token of {name}{tried}")
    return FileTokenizer(content, name, vocabulary[found])
