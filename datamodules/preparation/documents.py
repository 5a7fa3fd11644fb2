"""Reads documents from files, folders, globs and Hugging Face datasets, as bytes of bounded size."""

import glob
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from core.errors import ConfigError, Refused, require
from datamodules.stdlib_documents import library_documents

PIECE_BYTES = 1 << 20  # longer documents come in pieces, so that no file has to fit into memory
LINE_BYTES = 1 << 28  # of JSON, which is parsed as a whole
STDLIB = "python_stdlib"
HUB = "hf:"


class Piece(NamedTuple):
    """A document, or a part of one.

    Attributes:
        text: at most about PIECE_BYTES.
        ends: whether the document ends here.
        key: what decides on the document's split, if it is not the text.
    """

    text: bytes
    ends: bool
    key: bytes | None = None


@dataclass(frozen=True)
class Inputs:
    """What is read, and how.

    Args:
        names: paths of files, in order; or one `hf:NAME`, or `python_stdlib`.
        text_field: field of a JSON line, column of a table, that holds the text.
        separator: in text files, what stands between two documents; None: a file is a document.
    """

    names: tuple[str, ...]
    text_field: str
    separator: str | None

    def fingerprint(self) -> list[list[Any]]:
        """[name, size in bytes] of each; a preparation that goes on must find the same."""
        return [[name, Path(name).stat().st_size if Path(name).is_file() else None] for name in self.names]

    @property
    def num_bytes(self) -> int | None:
        """Of text; None where only reading tells."""
        if all(_kind(Path(name)) == "text" and Path(name).is_file() for name in self.names):
            return sum(Path(name).stat().st_size for name in self.names)
        return None

    def pieces(self) -> Iterator[Piece]:
        """All documents, in an order that never changes.

        Raises:
            ConfigError: a file is not what its name says, a field is missing, or a library is not installed.
        """
        for name in self.names:
            if name == STDLIB:
                yield from (
                    piece._replace(key=path.encode()) for path, text in library_documents() for piece in cut(text)
                )
            elif name.startswith(HUB):
                yield from itertools.chain.from_iterable(map(cut, self._from_hub(name.removeprefix(HUB))))
            else:
                yield from self._from_file(Path(name))

    def _from_file(self, path: Path) -> Iterator[Piece]:
        read = {"parquet": self._from_parquet, "jsonl": self._from_lines}.get(_kind(path), self._from_text)
        try:
            yield from read(path)
        except (OSError, EOFError, zlib.error) as error:  # damaged archives raise any of them
            raise Refused("input", str(path), f"cannot be read ({error})") from error

    def _from_text(self, path: Path) -> Iterator[Piece]:
        with _open(path) as file:
            yield from _split_text(file, self.separator.encode() if self.separator else None)

    def _from_lines(self, path: Path) -> Iterator[Piece]:
        with _open(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), b""), start=1):
                if len(line) > LINE_BYTES:
                    raise Refused(
                        "input", f"{path}, line {number}", f"a line of JSON is longer than {LINE_BYTES:,} bytes"
                    )
                if line.strip():
                    yield from cut(self._from_json(line, f"{path}, line {number}"))

    def _from_json(self, line: bytes, where: str) -> bytes:
        try:
            content = json.loads(line)
        except ValueError as error:
            raise Refused("input", where, f"this line is no JSON ({error})") from error
        text = content.get(self.text_field) if isinstance(content, dict) else None
        if not isinstance(text, str):
            found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
            raise ConfigError("text_field", self.text_field, f"a field with text; {where} has {found}")
        return text.encode("utf-8", "surrogatepass")

    def _from_parquet(self, path: Path) -> Iterator[Piece]:
        parquet = import_optional("pyarrow.parquet", "pyarrow")
        try:
            table = parquet.ParquetFile(path)
        except ValueError as error:  # pyarrow's word for a file that is none
            raise Refused("input", str(path), f"cannot be read as parquet ({error})") from error
        with table:
            columns = table.schema_arrow.names
            valid = f"a column of {path}: one of {', '.join(columns)}"
            require(self.text_field in columns, "text_field", self.text_field, valid)
            for batch in table.iter_batches(batch_size=256, columns=[self.text_field]):
                for text in batch.column(0).to_pylist():
                    yield from cut((text or "").encode("utf-8", "surrogatepass"))

    def _from_hub(self, name: str) -> Iterator[bytes]:
        datasets = import_optional("datasets", "datasets")
        dataset, _, subset = name.partition(":")
        try:
            rows = datasets.load_dataset(dataset, subset or None, split="train", streaming=True)
        except Exception as error:  # the library raises whatever its file systems do
            raise Refused("input", f"{HUB}{name}", f"{type(error).__name__}: {error}".splitlines()[0]) from error
        for row in rows:
            valid = f"a column of {name}: one of {', '.join(row)}"
            require(isinstance(row.get(self.text_field), str), "text_field", self.text_field, valid)
            yield row[self.text_field].encode("utf-8", "surrogatepass")


def find_inputs(patterns: Iterable[str], text_field: str, separator: str | None) -> Inputs:
    """Expand folders (every file below, hidden ones left out) and globs; files come in order of their paths.

    Raises:
        ConfigError: a pattern that matches nothing.
    """
    names: list[str] = []
    for pattern in patterns:
        if pattern == STDLIB or pattern.startswith(HUB):
            names.append(pattern)
            continue
        found = [pattern] if Path(pattern).exists() else _glob(pattern)
        below = itertools.chain.from_iterable(
            Path(path).rglob("*") if Path(path).is_dir() else [Path(path)] for path in found
        )
        files = sorted(str(path) for path in below if _is_meant(path, pattern) and not _hidden(path, found))
        require(bool(files), "input", pattern, f"a file, a folder with files, a glob, {HUB}NAME or {STDLIB}")
        names += files
    return Inputs(tuple(dict.fromkeys(names)), text_field, separator)


def _is_meant(path: Path, pattern: str) -> bool:
    """Of a folder or a pattern plain files; a pipe only where it is named itself."""
    return path.is_file() or (str(path) == pattern and path.exists() and not path.is_dir())


def _glob(pattern: str) -> list[str]:
    """glob.glob, but `**` follows no symbolic links, which may lead round in circles."""
    if "**" not in Path(pattern).parts:
        return glob.glob(pattern)
    above, _, below = pattern.partition("**")
    roots = [Path(root) for root in glob.glob(above)] if above else [Path()]
    found = [path for root in roots for path in root.glob(f"**{below}") if not _hidden(path, [str(root)])]
    return [str(path) for path in found if not (path.is_symlink() and path.is_dir())]  # which Python 3.13 gives too


def _hidden(path: Path, roots: list[str]) -> bool:
    """Whether a part of the path below the folder that was asked for begins with a dot."""
    root = next((Path(root) for root in roots if path.is_relative_to(root)), Path())
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def cut(text: bytes) -> Iterator[Piece]:
    """A document in pieces; nothing of an empty one."""
    while len(text) > PIECE_BYTES:
        place = _cutting_place(text[:PIECE_BYTES])
        yield Piece(text[:place], ends=False)
        text = text[place:]
    if text:
        yield Piece(text, ends=True)


def _split_text(file: BinaryIO, separator: bytes | None) -> Iterator[Piece]:
    rest, is_open = b"", False  # is_open: a piece of this document was handed out already
    while block := file.read(PIECE_BYTES):
        rest += block
        if separator:
            *documents, rest = rest.split(separator)
            for document in documents:
                yield from [Piece(b"", ends=True)] if is_open and not document else cut(document)
                is_open = False
        # The end may be the beginning of a separator.
        safe = len(rest) - (len(separator) - 1 if separator else 0)
        if safe > PIECE_BYTES:
            place = _cutting_place(rest[:safe])
            yield Piece(rest[:place], ends=False)
            rest, is_open = rest[place:], True
    if rest or is_open:
        yield Piece(rest, ends=True)


def _cutting_place(text: bytes) -> int:
    """After the last line; failing that, before the last character, which may not be whole."""
    place = text.rfind(b"\n") + 1
    if place == 0:
        place = len(text) - 1
        while place > 1 and text[place] & 0xC0 == 0x80:
            place -= 1
    return place


def _kind(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".zst")]
    if suffixes[-1:] == [".parquet"]:
        return "parquet"
    if suffixes[-1:] in ([".jsonl"], [".ndjson"]):
        return "jsonl"
    return "text" if len(suffixes) == len(path.suffixes) else "compressed text"


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        # Unlike the zstandard package's readers, pyarrow's says when the file ends too early.
        return cast(
            BinaryIO, io.BufferedReader(import_optional("pyarrow", "pyarrow").input_stream(path, compression="zstd"))
        )
    return path.open("rb")


def import_optional(module: str, package: str) -> Any:
    """A module of requirements-data.txt.

    Raises:
        Refused: it is not installed; says how.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        remedy = f"{package} is not installed: pip install -r requirements-data.txt"
        raise Refused("input", package, remedy) from error
