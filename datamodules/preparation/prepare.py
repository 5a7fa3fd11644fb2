"""From text to a prepared corpus: resumable, and the same bytes however many processes work on it."""

import fcntl
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from core.errors import ConfigError, UserError, require, writing
from datamodules.index import Index
from datamodules.preparation.bpe import find_tokenizer, make_tokenizer, train_bpe, wanted_size
from datamodules.preparation.documents import Inputs, find_inputs
from datamodules.preparation.encoding import SplitPiece, encode_all, units
from datamodules.stdlib_documents import SOURCE, split_of
from datamodules.storage import LocalFolder, read_index
from datamodules.tokenizers import Tokenizer
from datamodules.writer import PAGE_TOKENS, SHARD_TOKENS, CorpusWriter

CHECKPOINT_SECONDS = 2.0
SETTINGS, TOKENIZER, LOCK = "settings.json", "tokenizer.json", "lock"


@dataclass(frozen=True)
class PrepareConfig:
    """`python -m tools.prepare FIELD=VALUE ...`"""

    input: str  # files, folders, globs, hf:DATASET[:SUBSET] or python_stdlib; several are separated by commas
    output: str  # the corpus' folder
    tokenizer: str = "byte"  # byte, bpe:SIZE (trained here), hf:NAME, or the path of a tokenizer.json
    text_field: str = "text"  # of JSON lines, parquet files and datasets
    separator: str | None = None  # in text files, between two documents (\n\n); null: a file is a document
    validation: float = 0.05  # share of the documents, chosen by a hash of their text
    end_of_document: str | None = None  # the token that closes documents; null: the tokenizer's usual one
    processes: int | None = None  # null: one a core
    shard_tokens: int = SHARD_TOKENS  # length of a shard

    def __post_init__(self) -> None:
        require(0 < self.validation < 1, "validation", self.validation, "a number in (0, 1)")
        require(self.processes is None or self.processes >= 1, "processes", self.processes, "an integer >= 1 or null")
        valid = f"a multiple of {PAGE_TOKENS}"
        require(
            self.shard_tokens > 0 and self.shard_tokens % PAGE_TOKENS == 0, "shard_tokens", self.shard_tokens, valid
        )
        require(self.separator != "", "separator", self.separator, "text, or null")
        if self.tokenizer.startswith("bpe:"):
            wanted_size(self.tokenizer)


Report = Callable[[int, int, int | None], None]
"""Is told (bytes of text, documents, bytes in all or None) each time some are done."""


def prepare(config: PrepareConfig, report: Report = lambda *_: None) -> Index:
    """Write the corpus, or go on where an earlier, interrupted call stopped; one that is there already stays.

    Raises:
        ConfigError: a setting that cannot work, or a folder that holds something else.
    """
    separator = config.separator.replace("\\n", "\n").replace("\\t", "\t") if config.separator else None
    inputs = find_inputs([part.strip() for part in config.input.split(",")], config.text_field, separator)
    given = find_tokenizer(config.tokenizer) if not config.tokenizer.startswith("bpe:") else None
    settings = {key: value for key, value in asdict(config).items() if key not in ("output", "processes")}
    made = {"settings": settings, "inputs_sha256": sha256(json.dumps(inputs.fingerprint()).encode()).hexdigest()}
    output = Path(config.output)
    if (output / "index.json").exists():
        index = read_index(LocalFolder(output))
        there = {key: index.made.get(key) for key in made}
        require(there == made, "output", str(output), "a new folder: the corpus in this one was made in another way")
        return index
    valid = "a new folder, or one with a prepared corpus"
    require(not output.exists() or (output.is_dir() and not any(output.iterdir())), "output", str(output), valid)
    with writing("output", output), _scratch(output, made) as scratch:
        tokenizer, content = _tokenizer(config, inputs, given, scratch)
        description = _describe(config, tokenizer, content, made)
        writer = CorpusWriter(scratch, description, config.shard_tokens)
        try:
            _write(writer, inputs, tokenizer, config, report)
            for name, split in writer.splits.items():
                valid = f"a share that gives {name} documents too (separator=... cuts text files into documents)"
                require(split.num_tokens > 0, "validation", config.validation, valid)
            (scratch / SETTINGS).unlink()
            index = writer.finish(output)
            (output / LOCK).unlink(missing_ok=True)  # not before: whoever came meanwhile would take it, and clean up
            return index
        finally:
            writer.abandon()


@contextmanager
def _scratch(output: Path, made: dict[str, Any]) -> Iterator[Path]:
    """The folder beside the output where an unfinished corpus lies, for this process alone."""
    scratch = output.parent / f".{output.name}.partial"
    scratch.mkdir(parents=True, exist_ok=True)
    with (scratch / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = _is_at(scratch / LOCK, lock)  # or it has gone with the folder, which has become a corpus meanwhile
        except OSError:
            ours = False
        require(ours, "output", str(output), "a folder that no other process is preparing")
        path = scratch / SETTINGS
        if path.exists() and json.loads(path.read_text()) != made:
            valid = f"the settings and input of the unfinished preparation in {scratch}, or that folder deleted"
            raise ConfigError("output", str(output), valid)
        if not path.exists():  # nothing that can be gone on from
            for left_over in scratch.iterdir():
                if left_over.name != LOCK:
                    left_over.unlink()
            path.write_text(json.dumps(made))
        try:
            yield scratch
        except UserError:  # it would end there again
            shutil.rmtree(scratch)
            raise
        if output.exists() and _is_at(scratch / LOCK, lock):  # another process was first
            shutil.rmtree(scratch)


def _is_at(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _tokenizer(
    config: PrepareConfig, inputs: Inputs, given: bytes | None, scratch: Path
) -> tuple[Tokenizer, bytes | None]:
    path = scratch / TOKENIZER
    if path.exists():
        given = path.read_bytes()
    elif config.tokenizer.startswith("bpe:"):
        training = (piece.text for piece in _split_pieces(inputs, config.validation) if piece.split == "train")
        given = train_bpe(training, wanted_size(config.tokenizer))
    tokenizer = make_tokenizer(given, config.tokenizer, config.end_of_document)
    if given is not None and not path.exists():
        draft = scratch / f"{TOKENIZER}.draft"
        draft.write_bytes(given)
        draft.replace(path)
    return tokenizer, given


def _describe(
    config: PrepareConfig, tokenizer: Tokenizer, content: bytes | None, made: dict[str, Any]
) -> dict[str, Any]:
    return {
        "vocab_size": tokenizer.vocab_size,
        "end_of_document": tokenizer.end_of_document,
        "tokenizer": tokenizer.name,
        "tokenizer_file": TOKENIZER if content is not None else None,
        "tokenizer_sha256": sha256(content).hexdigest() if content is not None else None,
        "source": SOURCE if config.input == "python_stdlib" else config.input,
        "made": {**made, "python": platform.python_version(), "numpy": np.__version__},
    }


def _split_pieces(inputs: Inputs, validation: float) -> Iterator[SplitPiece]:
    """All pieces of a document go where its first one does."""
    split = None
    for piece in inputs.pieces():
        split = split or split_of(piece.text if piece.key is None else piece.key, validation)
        yield SplitPiece(split, piece.text, piece.ends)
        if piece.ends:
            split = None


def _write(writer: CorpusWriter, inputs: Inputs, tokenizer: Tokenizer, config: PrepareConfig, report: Report) -> None:
    pieces = _split_pieces(inputs, config.validation)
    done, total = writer.pieces, inputs.num_bytes
    for piece in islice(pieces, done):
        report(len(piece.text), piece.ends, total)
    saved = -math.inf
    for unit, encoded in encode_all(units(pieces), tokenizer, config.processes or os.cpu_count() or 1):
        for name, part in encoded.items():
            writer.splits[name].append(*part)
        done += len(unit)
        report(sum(len(piece.text) for piece in unit), sum(piece.ends for piece in unit), total)
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            writer.checkpoint(done)
            saved = time.monotonic()
