"""Reads documents from files and Hugging Face datasets, as bytes of bounded size."""

import itertools
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from core.errors import ConfigError, InvalidValue, one_line
from core.untrusted import Untrusted, check_json
from datamodules.package_documents import PACKAGES, package_documents
from datamodules.preparation.bounds import Bounds
from datamodules.preparation.dataset_card import check_card
from datamodules.preparation.formats import BYTE_ORDER_MARK, COMPRESSIONS, TABLE_SUFFIXES, open_input, suffix_of
from datamodules.preparation.inputs import HUB, STDLIB, find_names, num_bytes
from datamodules.preparation.optional import import_optional
from datamodules.preparation.tables import texts_of_table
from datamodules.stdlib_documents import library_documents

PIECE_BYTES = 1 << 20  # longer documents come in pieces, so that no file has to fit into memory
LONGEST_CHARACTER = 4  # bytes, in UTF-8
OR_TEXT = " (format=text takes JSON for plain text)"
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)  # archives raise any of them


class Piece(NamedTuple):
    """A document, or a part of one.

    Attributes:
        text: at most about PIECE_BYTES.
        ends: whether the document ends here.
        key: of a document's first piece, what decides on its split, if it is not the piece's text.
        split: the one that its source puts it into, where nothing is left to decide.
    """

    text: bytes
    ends: bool
    key: bytes | None = None
    split: str | None = None


@dataclass
class Tally:
    """Counts what was read, for what has to be said about it.

    Attributes:
        null: records whose text is null; they are left out.
        empty: records whose text is empty; they are left out.
        text_files: files that were read as plain text.
        separators: where the separator stood in them.
        unseparated: names of those with text in which it stood nowhere, so that each became one document.
        carriage_returns: how many of the unseparated have a line that ends with a carriage return.
        tables_as_text: names of files of comma- or tab-separated values that were read as plain text.
    """

    null: int = 0
    empty: int = 0
    text_files: int = 0
    separators: int = 0
    unseparated: list[str] = field(default_factory=list)
    carriage_returns: int = 0
    tables_as_text: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Inputs:
    """The inputs that are read, and how.

    Args:
        names: paths of files, in order; or `hf:NAME`, `python_stdlib` or `python_packages`.
        text_field: field of a JSON line, column of a table, that holds the text.
        separator: in text files, what stands between two documents; None: a file is a document.
        format: one of formats.FORMATS.
        bounds: that hold for each file.
        repeated: how many further names there were of files that are among `names`.
    """

    names: tuple[str, ...]
    text_field: str = "text"
    separator: str | None = None
    format: str = "auto"
    bounds: Bounds = field(default_factory=Bounds)
    repeated: int = 0

    @property
    def num_bytes(self) -> int | None:
        """Return the number of bytes of text; None where only reading tells."""
        suffixes = {suffix.lower() for name in self.names for suffix in Path(name).suffixes[-2:]}
        return None if suffixes & {*COMPRESSIONS, *TABLE_SUFFIXES} else num_bytes(self.names)

    def pieces(self, tally: Tally | None = None) -> Iterator[Piece]:
        """Yield all documents, in an order that never changes.

        Args:
            tally: is added to.

        Raises:
            ConfigError: a file is not what its name says, a field is missing, a bound is passed, or a library is not
                installed.
        """
        tally = tally or Tally()
        for name in self.names:
            if name == STDLIB:
                yield from (
                    piece._replace(key=path.encode()) for path, text in library_documents() for piece in cut(text)
                )
            elif name == PACKAGES:
                yield from (
                    piece._replace(split=split) for split, _, text in package_documents() for piece in cut(text)
                )
            elif name.startswith(HUB):
                yield from self._cut_all(self._from_hub(name.removeprefix(HUB)), tally)
            else:
                try:
                    yield from self._from_file(Path(name), tally)
                except DAMAGED as error:
                    raise InvalidValue("input", name, f"cannot be read ({error})") from error

    def _from_file(self, path: Path, tally: Tally) -> Iterator[Piece]:
        kind, file = open_input(path, self.format, self.text_field, self.bounds)
        with file:
            if kind == "parquet":
                yield from self._cut_all(texts_of_table(path, self.text_field, self.bounds), tally)
            elif kind == "lines":
                yield from self._cut_all(self._from_lines(file, path), tally)
            elif kind == "document":
                yield from self._cut_all(self._from_document(file, path), tally)
            else:
                tally.text_files += 1
                if suffix_of(path) in (".csv", ".tsv"):
                    tally.tables_as_text.append(str(path))
                separator = self.separator.encode() if self.separator else None
                yield from _split_text(_without_mark(file), str(path), separator, tally)

    def _cut_all(self, texts: Iterator[bytes | None], tally: Tally) -> Iterator[Piece]:
        for text in texts:
            if text is None:
                tally.null += 1
            elif not text:
                tally.empty += 1
            else:
                yield from cut(text)

    def _from_lines(self, file: BinaryIO, path: Path) -> Iterator[bytes | None]:
        limit = self.bounds.record_bytes
        for number, line in enumerate(iter(lambda: file.readline(limit + 1), b""), start=1):
            where = f"{path}, line {number}"
            self.bounds.check_record(len(line), where, "a line of JSON")
            if line.strip():
                yield self._text_of(_parse(line, where, "this line"), where, OR_TEXT)

    def _from_document(self, file: BinaryIO, path: Path) -> Iterator[bytes | None]:
        """Yield the elements of a list, or the one object that there is."""
        text = file.read(self.bounds.record_bytes + 1)
        self.bounds.check_record(len(text), str(path), "a JSON document that is not in lines")
        content = _parse(text, str(path), "the file")
        if not isinstance(content, list):
            yield self._text_of(content, str(path), OR_TEXT)
            return
        for number, element in enumerate(content, start=1):
            yield self._text_of(element, f"{path}, element {number}", OR_TEXT)

    def _text_of(self, content: Any, where: str, remedy: str = "") -> bytes | None:
        """Return the text of a record; None: it is null."""
        text = content.get(self.text_field, self) if isinstance(content, dict) else self
        if text is None:
            return None
        if not isinstance(text, str):
            valid = f"a field with text; {where} {_fields(content, text)}{remedy}"
            raise ConfigError("text_field", self.text_field, valid)
        return text.encode("utf-8", "surrogatepass")

    def _from_hub(self, name: str) -> Iterator[bytes | None]:
        datasets = import_optional("datasets", "datasets")
        dataset, _, subset = name.partition(":")
        if Path(dataset).is_dir():
            check_card(Path(dataset), f"{HUB}{name}")
        try:
            found = datasets.load_dataset(dataset, subset or None, split="train", streaming=True)
            # To decode pictures, which nobody looks at, would open or fetch whatever a row calls one.
            plain = found.decode(False) if found.features else found
            rows = iter(plain if plain.features != found.features else found)
            number, row = 0, next(rows, None)
        except Exception as error:  # the library raises whatever its file systems do
            raise InvalidValue("input", f"{HUB}{name}", one_line(f"{type(error).__name__}: {error}")) from error
        while row is not None:
            number += 1
            text = self._text_of(row, f"row {number} of {name}")
            self.bounds.check_record(len(text or b""), f"{HUB}{name}, row {number}", "a text")
            yield text
            try:
                row = next(rows, None)
            except Exception as error:
                raise InvalidValue("input", f"{HUB}{name}", one_line(f"{type(error).__name__}: {error}")) from error


def find_inputs(
    patterns: Iterable[str],
    text_field: str = "text",
    separator: str | None = None,
    format: str = "auto",
    bounds: Bounds | None = None,
) -> Inputs:
    """Expand folders and globs: inputs.find_names.

    Raises:
        ConfigError: a pattern that matches nothing, or that names something that has no end.
    """
    names, repeated = find_names(patterns)
    return Inputs(names, text_field, separator, format, bounds or Bounds(), repeated)


def _fields(content: Any, text: object) -> str:
    """Return what a record has instead of a text, in words."""
    if not isinstance(content, dict):
        return f"is a {type(content).__name__}"
    names = ", ".join(map(str, itertools.islice(content, 20))) or "none"
    is_there = not isinstance(text, Inputs)
    return f"has a {type(text).__name__} there" if is_there else f"has {names}{', ...' * (len(content) > 20)}"


def _parse(text: bytes, where: str, what: str) -> Any:
    try:
        check_json(text, what)
        return json.loads(text.removeprefix(BYTE_ORDER_MARK))
    except Untrusted as error:
        raise InvalidValue("input", where, str(error)) from error
    except RecursionError as error:
        raise InvalidValue("input", where, "JSON nested deeper than the parser goes, some 1,000 levels") from error
    except ValueError as error:
        raise InvalidValue("input", where, f"{what} is no JSON ({error})") from error


def _without_mark(file: BinaryIO) -> BinaryIO:
    """Return the file behind the byte order mark that some editors put in front of UTF-8."""
    peek: Any = file
    if bytes(peek.peek(len(BYTE_ORDER_MARK))[: len(BYTE_ORDER_MARK)]) == BYTE_ORDER_MARK:
        file.read(len(BYTE_ORDER_MARK))
    return file


def cut(text: bytes) -> Iterator[Piece]:
    """Yield a document in pieces; nothing of an empty one."""
    start = 0
    while len(text) - start > PIECE_BYTES:
        block = text[start : start + PIECE_BYTES]
        place = _cutting_place(block)
        yield Piece(block[:place], ends=False)
        start += place
    if start < len(text):
        yield Piece(text[start:], ends=True)


def _split_text(file: BinaryIO, name: str, separator: bytes | None, tally: Tally) -> Iterator[Piece]:
    rest, is_open = b"", False  # is_open: a piece of this document was handed out already
    is_separated = carriage_returns = False
    while block := file.read(PIECE_BYTES):
        carriage_returns = carriage_returns or b"\r\n" in block
        rest += block
        if separator:
            *documents, rest = rest.split(separator)
            tally.separators += len(documents)
            is_separated = is_separated or bool(documents)
            for document in documents:
                yield from [Piece(b"", ends=True)] if is_open and not document else cut(document)
                is_open = False
        # The end may be the beginning of a separator.
        safe = len(rest) - (len(separator) - 1 if separator else 0)
        if safe > PIECE_BYTES:
            place = _cutting_place(rest[:safe])
            yield Piece(rest[:place], ends=False, key=None if is_open else _key(rest))
            rest, is_open = rest[place:], True
    if rest or is_open:
        if separator and not is_separated:  # counted before the document ends, behind which nobody may read on
            tally.unseparated.append(name)
            tally.carriage_returns += carriage_returns
        yield Piece(rest, ends=True, key=None if is_open else _key(rest))


def _key(text: bytes) -> bytes:
    """Return the first piece that `cut` makes of a document, of which a little more than that is known at least.

    Where a text file's documents are cut depends on what stands before them; their split must not.
    """
    return text if len(text) <= PIECE_BYTES else text[: _cutting_place(text[:PIECE_BYTES])]


def _cutting_place(text: bytes) -> int:
    """Return where to cut: after the last line; failing that, before the last character, which may not be whole.

    Bytes that are no text may have no beginning of a character anywhere: only as many are looked at as a character has,
    so that every piece is about as long as the text is.
    """
    place = text.rfind(b"\n") + 1
    if place > 0:
        return place
    for place in range(len(text) - 1, max(len(text) - 1 - LONGEST_CHARACTER, 0), -1):
        if text[place] & 0xC0 != 0x80:
            return place
    return len(text)
