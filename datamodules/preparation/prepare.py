"""Makes a prepared corpus of text: resumable, and the same bytes however many processes work on it."""

import fcntl
import json
import math
import os
import platform
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np

from core.errors import ConfigError, InvalidValue, require, writing
from core.paths import behind_link
from core.untrusted import Untrusted, read_json
from datamodules.expression import MAX_LOSS, SAID_LOSS, describe_loss
from datamodules.index import SPLITS, Index
from datamodules.package_documents import PACKAGES, package_versions
from datamodules.preparation.bounds import Bounds
from datamodules.preparation.bpe import find_tokenizer, make_tokenizer, train_bpe, wanted_size
from datamodules.preparation.documents import Inputs, Tally, find_inputs
from datamodules.preparation.encoding import SplitPiece, WorkerDied, encode_all, units
from datamodules.preparation.formats import FORMATS
from datamodules.preparation.inputs import HUB, STDLIB, fingerprint, legacy_fingerprint
from datamodules.preparation.inspect import measured_loss
from datamodules.stdlib_documents import SOURCE, split_of
from datamodules.storage import LocalFolder, read_index
from datamodules.tokenizers import Tokenizer
from datamodules.writer import PAGE_TOKENS, SHARD_TOKENS, CorpusWriter

CHECKPOINT_SECONDS = 2.0
MOST_PROCESSES = 1024  # each has some units of text waiting for it
SETTINGS, TOKENIZER, LOCK = "settings.json", "tokenizer.json", "lock"
EARLY_BYTES = 16_000_000  # of text after which a loss is said while there may be much more to read
NOT_IN_RESULT = ("output", "processes", "max_lost", "max_record_mb", "max_expansion")
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0", "\\": "\\"}


@dataclass(frozen=True)
class PrepareConfig:
    r"""Holds the fields that `python -m tools.prepare` takes.

    Attributes:
        input: files, folders, globs, hf:DATASET[:SUBSET], python_stdlib or python_packages; commas separate several.
        output: the folder of the corpus, which is made.
        tokenizer: byte, bpe:SIZE (trained here), hf:NAME, or the path of a tokenizer.json or of a folder with one.
        text_field: the field that holds the text, in JSON lines, parquet files and datasets.
        format: what every file is; auto: as its content and name say.
        separator: what stands between two documents of a text file, as \n\n; null: a file is a document.
        validation: the share of the documents, chosen by a hash of their text, or of the first MiB of it.
        end_of_document: the token that closes documents; null: the folder's eos_token, or a usual one.
        processes: the number of processes; null: one a core.
        shard_tokens: the number of tokens in a shard.
        max_text_mb: read no further than the document with which so much text has been read, in 10^6 bytes; null: all.
        max_lost: the share of the text that may be missing in the tokens.
        max_record_mb: the largest line of JSON, JSON document or cell of a table, in 10^6 bytes.
        max_expansion: at most how many times its size a compressed file or a table may become.
    """

    input: str
    output: str
    tokenizer: str = "byte"
    text_field: str = "text"
    format: Literal["auto", "text", "json", "parquet"] = "auto"
    separator: str | None = None
    validation: float = 0.05
    end_of_document: str | None = None
    processes: int | None = None
    shard_tokens: int = SHARD_TOKENS
    max_text_mb: int | None = None
    max_lost: float = MAX_LOSS
    max_record_mb: int = 64
    max_expansion: int = 200

    def __post_init__(self) -> None:
        require(0 < self.validation < 1, "validation", self.validation, "a number in (0, 1)")
        processes = 1 if self.processes is None else self.processes
        require(processes >= 1, "processes", self.processes, "an integer >= 1 or null")
        require(processes <= MOST_PROCESSES, "processes", self.processes, f"at most {MOST_PROCESSES}")
        valid = f"a multiple of {PAGE_TOKENS}"
        require(
            self.shard_tokens > 0 and self.shard_tokens % PAGE_TOKENS == 0, "shard_tokens", self.shard_tokens, valid
        )
        most = 1 if self.max_text_mb is None else self.max_text_mb
        require(1 <= most <= 10**9, "max_text_mb", self.max_text_mb, "an integer in [1, 10^9], or null")
        require(self.separator != "", "separator", self.separator, "text, or null")
        require(self.format in FORMATS, "format", self.format, f"one of {', '.join(FORMATS)}")
        require(0 <= self.max_lost <= 1, "max_lost", self.max_lost, "a number in [0, 1]")
        require(1 <= self.max_record_mb <= 2000, "max_record_mb", self.max_record_mb, "an integer in [1, 2000]")
        require(1 <= self.max_expansion <= 10**9, "max_expansion", self.max_expansion, "an integer in [1, 10^9]")
        if self.tokenizer.startswith("bpe:"):
            wanted_size(self.tokenizer)


Report = Callable[[int, int, int | None], None]
"""Is told (bytes of text, documents, bytes in all or None) each time some are done."""


Say = Callable[[str], None]
"""Is told, in a line, what the user should know about the input or the result."""


def prepare(config: PrepareConfig, report: Report = lambda *_: None, say: Say = lambda _: None) -> Index:
    """Write the corpus, or go on where an earlier, interrupted call stopped; one that is there already stays.

    Raises:
        ConfigError: a setting that cannot work, or a folder that holds something else.
    """
    bounds = Bounds(config.max_record_mb, config.max_expansion)
    patterns = [part.strip() for part in config.input.split(",")]
    separator = unescape(config.separator) if config.separator else None
    inputs = find_inputs(patterns, config.text_field, separator, config.format, bounds)
    given = find_tokenizer(config.tokenizer) if not config.tokenizer.startswith("bpe:") else None
    found = fingerprint(inputs.names)
    made = {
        "settings": {key: value for key, value in asdict(config).items() if key not in NOT_IN_RESULT},
        "inputs_sha256": _sha256(found),
        "given_tokenizer_sha256": sha256(given).hexdigest() if given is not None else None,
    }
    with writing("output", config.output):
        output = behind_link(Path(config.output))
        is_there = (output / "index.json").exists()
    if is_there:
        index = read_index(LocalFolder(output))
        if changed := _changed(index, made, inputs):
            valid = f"a new folder: the corpus in this one was made in another way ({changed})"
            raise ConfigError("output", str(output), valid)
        say(f"{output} was there already, made by this command from these inputs: nothing was read or written")
        _tell_again(index, inputs, say)
        return index
    valid = "a new folder, or one with a prepared corpus"
    free = not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir()))
    require(free, "output", config.output, valid)
    with writing("output", output), _scratch(output, made) as scratch:
        tokenizer, content = _tokenizer(config, inputs, given, scratch)
        writer = CorpusWriter(scratch, _describe(config, tokenizer, content, made), config.shard_tokens)
        try:
            tally, characters = _write(writer, inputs, tokenizer, config, report, say)
            _tell(tally, inputs, config, say)
            for name, split in writer.splits.items():
                valid = f"a share that gives {name} documents too (separator=... cuts text files into documents)"
                require(split.num_tokens > 0, "validation", config.validation, valid)
            if fingerprint(inputs.names) != found:
                raise InvalidValue("input", config.input, "a file of it was changed while it was read; start again")
            _check_loss(writer, config, characters, say)
            writer.description["made"] |= {
                "left_out": {"null": tally.null, "empty": tally.empty},
                "lost": {
                    name: {"of_bytes": split.num_bytes, "lost": split.lost, "invalid": split.invalid}
                    for name, split in writer.splits.items()
                },
            }
            (scratch / SETTINGS).unlink()
            index = writer.finish(output)
            (output / LOCK).unlink(missing_ok=True)  # not before: whoever came meanwhile would take it, and clean up
        finally:
            writer.abandon()
    return index


def unescape(text: str) -> str:
    r"""Return the text with \n, \t, \r, \f, \v, \0, \\ and \xHH, \uHHHH as the characters that they stand for."""

    def character(found: re.Match[str]) -> str:
        name = found[1]
        return ESCAPES[name] if name in ESCAPES else chr(int(name[1:], 16))

    return re.sub(r"\\([ntrfv0\\]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})", character, text)


def _sha256(content: Any) -> str:
    return sha256(json.dumps(content).encode()).hexdigest()


def _changed(index: Index, made: dict[str, Any], inputs: Inputs) -> str | None:
    """Return in which way a corpus was made otherwise, in words; None: in none that can be seen."""
    there: dict[str, Any] = index.made if isinstance(index.made, dict) else {}
    before, now = there.get("settings"), made["settings"]
    if not isinstance(before, dict):
        return "its index does not say how"
    before = {"format": "auto", "max_text_mb": None, **before}  # which indexes of old do not have
    for name in now:
        if before.get(name) != now[name]:
            return f"with {name}={before.get(name)!r}"
    is_old = "given_tokenizer_sha256" not in there
    if there.get("inputs_sha256") != (_sha256(legacy_fingerprint(inputs.names)) if is_old else made["inputs_sha256"]):
        return "from other inputs: a file's size or time of change is another, or there are more or fewer of them"
    expected = made["given_tokenizer_sha256"]
    if expected is not None and index.tokenizer_sha256 != expected:
        return "with another content of the tokenizer's file"
    return None


def _check_loss(writer: CorpusWriter, config: PrepareConfig, characters: Counter[str], say: Say) -> None:
    """Say how much of the text is not in the tokens, and refuse too much of it."""
    lost, invalid, size = (
        sum(getattr(split, name) for split in writer.splits.values()) for name in ("lost", "invalid", "num_bytes")
    )
    line = describe_loss(lost, invalid, size, characters)
    share = (lost + invalid) / max(size, 1)
    if share > config.max_lost:
        remedy = "take a tokenizer that has bytes, or text in UTF-8"
        raise InvalidValue("tokenizer", config.tokenizer, f"{line}; {remedy}, or max_lost={_up(share)} allows it")
    empty = [name for name, split in writer.splits.items() if split.num_bytes == split.lost + split.invalid]
    if empty:
        raise InvalidValue(
            "tokenizer", config.tokenizer, f"nothing of the text of {' and '.join(empty)} is in the tokens"
        )
    if share > SAID_LOSS:
        say(line)


def _tell_again(index: Index, inputs: Inputs, say: Say) -> None:
    """Say of a corpus that was there already what was said when it was made, and what could not be compared."""
    remote = [name for name in inputs.names if name.startswith(HUB) and not Path(name.removeprefix(HUB)).is_dir()]
    if remote:
        say(f"what {remote[0]} holds today was not compared with it; a new output reads it again")
    losses = [loss for name in SPLITS if (loss := measured_loss(index, name))]
    lost, invalid, size = (sum(loss[key] for loss in losses) for key in ("lost", "invalid", "of_bytes"))
    if lost + invalid > SAID_LOSS * size:
        say(describe_loss(lost, invalid, size))


def _up(share: float) -> float:
    return min(1.0, math.ceil(share * 100) / 100)


def _tell(tally: Tally, inputs: Inputs, config: PrepareConfig, say: Say) -> None:
    """Say what of the input was left out, or read otherwise than its name may suggest."""
    if inputs.repeated:
        say(f"files named again, by another path or a link: {inputs.repeated:,}; each was read once")
    if tally.null or tally.empty:
        say(f"records left out because their {config.text_field} is null: {tally.null:,}; is empty: {tally.empty:,}")
    if tally.tables_as_text:
        say(f"tables read as plain text: {len(tally.tables_as_text):,}, {tally.tables_as_text[0]} the first of them")
    if config.separator is not None and not tally.text_files:
        say(f"separator={config.separator!r} was not used: no input is a text file")
    elif config.separator is not None and not tally.separators:
        ends = r"; their lines end with \r\n" if tally.carriage_returns else ""
        say(f"separator={config.separator!r} stands nowhere in the text files: each was one document{ends}")
    elif tally.unseparated:
        first, *others = tally.unseparated
        files = f"{len(others) + 1:,} of {tally.text_files:,} text files, {first} the first of them"
        ends = rf"; lines of {tally.carriage_returns:,} of them end with \r\n" if tally.carriage_returns else ""
        say(f"separator={config.separator!r} stands nowhere in {files}: each was one document{ends}")


@contextmanager
def _scratch(output: Path, made: dict[str, Any]) -> Iterator[Path]:
    """Give the folder beside the output where an unfinished corpus lies, for this process alone."""
    scratch = output.parent / f".{output.name}.partial"
    scratch.mkdir(parents=True, exist_ok=True)
    for path in (scratch, *scratch.iterdir()):  # it may have come with the folder around it, from a stranger
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise InvalidValue("output", str(output), f"{path} is a link or no regular file; delete it")
    with (scratch / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = _is_at(scratch / LOCK, lock)  # or it has gone with the folder, which has become a corpus meanwhile
        except OSError:
            ours = False
        require(ours, "output", str(output), "a folder that no other process is preparing")
        path = scratch / SETTINGS
        before = _read_settings(path)
        begun = any(file.name not in (LOCK, SETTINGS) for file in scratch.iterdir())
        if before is not None and before != made and begun:
            valid = f"the settings and input of the unfinished preparation in {scratch}, or that folder deleted"
            raise ConfigError("output", str(output), valid)
        if before != made:  # nothing that can be gone on from
            for left_over in scratch.iterdir():
                if left_over.name != LOCK:
                    left_over.unlink()
            path.write_text(json.dumps(made))
        try:
            yield scratch
        except (OSError, WorkerDied):  # a full disk, too little memory: another time it goes on
            raise
        except Exception:  # it would end there again, and be in the way of another command
            shutil.rmtree(scratch)
            raise
        if output.exists() and _is_at(scratch / LOCK, lock):  # another process was first
            shutil.rmtree(scratch)


def _read_settings(path: Path) -> dict[str, Any] | None:
    """Return how an unfinished preparation was begun; None: that cannot be told."""
    try:
        content: dict[str, Any] = read_json(path)
    except Untrusted:
        return None
    return content


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
        training = (piece.text for piece in _split_pieces(inputs, config) if piece.split == "train")
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
        "source": _source(config.input),
        "made": {**made, "python": platform.python_version(), "numpy": np.__version__},
    }


def _source(given: str) -> str:
    if given == PACKAGES:
        return f"Python packages: {', '.join(package_versions())}"
    return SOURCE if given == STDLIB else given


def _split_pieces(inputs: Inputs, config: PrepareConfig, tally: Tally | None = None) -> Iterator[SplitPiece]:
    """Yield (split, piece): all pieces of a document go where its first one does."""
    split, num_bytes = None, 0
    for piece in inputs.pieces(tally):
        begins = split is None
        split = split or piece.split or split_of(piece.text if piece.key is None else piece.key, config.validation)
        yield SplitPiece(split, piece.text, piece.ends, begins)
        num_bytes += len(piece.text)
        if piece.ends:
            split = None
            if config.max_text_mb is not None and num_bytes >= config.max_text_mb * 10**6:
                return


def _write(
    writer: CorpusWriter, inputs: Inputs, tokenizer: Tokenizer, config: PrepareConfig, report: Report, say: Say
) -> tuple[Tally, Counter[str]]:
    """Write all tokens; returns what was read, and which characters were lost."""
    tally, characters, said = Tally(), Counter[str](), False
    pieces = _split_pieces(inputs, config, tally)
    done, total = writer.pieces, inputs.num_bytes
    if config.max_text_mb is not None:
        most = config.max_text_mb * 10**6
        total = most if total is None else min(total, most)
    for piece in islice(pieces, done):
        report(len(piece.text), piece.ends, total)
    saved = -math.inf
    for unit, encoded in encode_all(units(pieces), tokenizer, config.processes or os.cpu_count() or 1):
        for name in SPLITS:
            if name in encoded:
                part = encoded[name]
                writer.splits[name].append(part.tokens, part.ends, part.num_bytes, part.lost, part.invalid)
                characters.update(part.characters)
        done += len(unit)
        report(sum(len(piece.text) for piece in unit), sum(piece.ends for piece in unit), total)
        if not said and sum(split.num_bytes for split in writer.splits.values()) > EARLY_BYTES:
            said = True
            _say_early(writer, config, characters, say)
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            writer.checkpoint(done)
            saved = time.monotonic()
    return tally, characters


def _say_early(writer: CorpusWriter, config: PrepareConfig, characters: Counter[str], say: Say) -> None:
    """Say while much may be left to read that this will be refused unless the rest is better."""
    lost, invalid, size = (
        sum(getattr(split, name) for split in writer.splits.values()) for name in ("lost", "invalid", "num_bytes")
    )
    if (lost + invalid) / size > config.max_lost:
        so_far = describe_loss(lost, invalid, size, characters)
        say(f"so far {so_far}; where it stays above max_lost={config.max_lost}, it will be refused at the end")
