"""Opens a file as what it holds: undoes its compression, and tells text, JSON, tables and binary content apart."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from core.errors import InvalidValue
from datamodules.preparation.bounds import Bounds
from datamodules.preparation.optional import import_optional

FORMATS = ("auto", "text", "json", "parquet")
HEAD_BYTES = 1 << 20  # looked at to tell what a file holds
BLOCK_BYTES = 1 << 20
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".lzma": "lzma", ".zst": "zstd", ".zstd": "zstd"}
COMPRESSED = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
}
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson", ".jsonlines", ".geojsonl")
TABLE_SUFFIXES = (".parquet", ".pq")
PARQUET = b"PAR1"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
HEADERS = (
    (0, b"\x89PNG\r\n", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"GIF87a", "a GIF image"),
    (0, b"GIF89a", "a GIF image"),
    (0, b"%PDF-", "a PDF document"),
    (0, b"PK\x03\x04", "a zip archive (or an office document, or a checkpoint)"),
    (0, b"PK\x05\x06", "an empty zip archive"),
    (0, b"Rar!\x1a\x07", "a RAR archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x7fELF", "a program"),
    (0, b"SQLite format 3\x00", "an SQLite database"),
    (0, b"\x89HDF\r\n", "an HDF5 file"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"ARROW1", "an Arrow file"),
    (0, b"Obj\x01", "an Avro file"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old office document"),
    (0, b"\x04\x22\x4d\x18", "LZ4-compressed data"),
    (0, b"\x1f\x9d", "data of compress"),
    (0, b"LZIP\x01", "lzip-compressed data"),
    (0, b"ID3\x02", "an MP3 file"),
    (0, b"ID3\x03", "an MP3 file"),
    (0, b"ID3\x04", "an MP3 file"),
    (0, b"OggS\x00", "an Ogg file"),
    (0, b"fLaC\x00", "a FLAC file"),
    (4, b"ftyp", "an MP4 file"),
    (0, b"\x80\x04\x95", "a pickle"),
    (0, b"\x80\x05\x95", "a pickle"),
    (0, b"\xff\xfe", "text in UTF-16"),
    (0, b"\xfe\xff", "text in UTF-16"),
)


class Opened(NamedTuple):
    """A file that is being read.

    Attributes:
        kind: "text", "lines" (of JSON), "document" (one of JSON) or "parquet".
        file: its content, decompressed.
    """

    kind: str
    file: BinaryIO


def open_input(path: Path, wanted: str, text_field: str, bounds: Bounds) -> Opened:
    """Open a file by its content; its name counts where the content leaves a choice.

    Args:
        wanted: one of FORMATS. "text" takes any bytes for text.
        text_field: a line of JSON that has it is one in a file of any name.

    Raises:
        InvalidValue: content that is none of text, JSON and parquet.
        OSError, EOFError, lzma.LZMAError, zlib.error: a damaged file.
    """
    raw = _Counted(path.open("rb", buffering=0))
    try:
        content = _Content(path, raw, bounds, binary=wanted == "text")
        kind = _kind(path, content, wanted, text_field)
        if kind == "parquet" and content.compression:
            raise _refused(path, f"a table within {content.compression}-compressed data: decompress it first")
    except BaseException:
        raw.close()
        raise
    return Opened(kind, io.BufferedReader(content, BLOCK_BYTES))


def _kind(path: Path, content: "_Content", wanted: str, text_field: str) -> str:
    head, suffix = content.head, suffix_of(path)
    if wanted in ("text", "parquet"):
        return wanted
    if wanted == "json":
        return _kind_of_json(head, content.is_whole)
    if head.startswith(PARQUET) or suffix in TABLE_SUFFIXES:
        return "parquet"
    for place, magic, name in HEADERS:
        if head[place : place + len(magic)] == magic:
            raise _refused(path, name)
    for name, pattern in COMPRESSED.items():
        if pattern.match(head):
            raise _refused(path, f"{name}-compressed data within {content.compression}-compressed data")
    content.check_text(head)
    if suffix in JSON_SUFFIXES:
        return _kind_of_json(head, content.is_whole)
    if _looks_like_lines(head, content.is_whole, text_field):
        return "lines"
    return "document" if _looks_like_list(head, content.is_whole, text_field) else "text"


def _kind_of_json(head: bytes, is_whole: bool) -> str:
    """Return lines, unless the first one is only the beginning of a document."""
    first, _ = _first_lines(head, is_whole)
    if first.startswith(b"["):
        return "document"
    # A first line that is longer than the head is a line: whoever indents a document breaks its lines.
    opens_document = first.startswith(b"{") and _parsed(first) is None and len(first) < HEAD_BYTES // 2
    return "document" if opens_document else "lines"


def _looks_like_lines(head: bytes, is_whole: bool, text_field: str) -> bool:
    """Return whether a file without a name of JSON's holds lines of it: objects, with a text or several of them."""
    first, second = _first_lines(head, is_whole)
    if not is_whole and len(first) > HEAD_BYTES // 2 and _begins_with_object(first, text_field):
        return True  # a record that is longer than what is looked at
    content = _parsed(first) if first.startswith(b"{") else None
    if not isinstance(content, dict):
        return False
    return isinstance(content.get(text_field), str) or isinstance(_parsed(second), dict)


def _looks_like_list(head: bytes, is_whole: bool, text_field: str) -> bool:
    """Return whether a file without a name of JSON's holds a list of objects with texts."""
    text = head.removeprefix(BYTE_ORDER_MARK).strip()
    if not text.startswith(b"[") or not _begins_with_object(text[1:].lstrip(), text_field):
        return False
    content = _parsed(text) if is_whole else [{text_field: ""}]
    return isinstance(content, list) and all(isinstance(each, dict) for each in content)


def _begins_with_object(text: bytes, text_field: str) -> bool:
    """Return whether a text that may be cut begins as an object of JSON, and names the field."""
    return re.match(rb'\{\s*"', text) is not None and json.dumps(text_field).encode() in text


def _first_lines(head: bytes, is_whole: bool) -> tuple[bytes, bytes]:
    """Return the first two lines with something in them; one that goes on behind the head is left out."""
    text = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    first, _, rest = text.partition(b"\n")
    second, ended, _ = rest.lstrip().partition(b"\n")
    return first.strip(), second.strip() if ended or is_whole else b""


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def suffix_of(path: Path) -> str:
    """Return the last one that names no compression, in small letters."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _refused(path: Path, what: str) -> InvalidValue:
    return InvalidValue(
        "input", str(path), f"holds {what}, which is not read; leave it out, or format=text takes it as it is"
    )


class _Counted(io.RawIOBase):
    """A file that knows how much of it was read."""

    def __init__(self, file: Any) -> None:
        self.file, self.consumed = file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = int(self.file.readinto(buffer))
        self.consumed += count
        return count

    def seekable(self) -> bool:
        return bool(self.file.seekable())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self.file.seek(offset, whence))

    def tell(self) -> int:
        return int(self.file.tell())

    def close(self) -> None:
        self.file.close()
        super().close()


class _Content(io.RawIOBase):
    """Reads what a file holds, decompressed, held against the bounds, and refused where it is no text.

    Args:
        path: its name, for the messages.
        raw: the file.
        bounds: of its expansion.
        binary: any bytes will do.

    Attributes:
        compression: its name; None: there is none.
        head: the beginning; a pipe cannot be read twice, so that it is kept and read again.
        is_whole: the head is all that there is.
    """

    def __init__(self, path: Path, raw: _Counted, bounds: Bounds, binary: bool) -> None:
        self.path, self.raw, self.bounds, self.binary = path, raw, bounds, binary
        buffered: Any = io.BufferedReader(raw, BLOCK_BYTES)
        self.compression = _compression(path, buffered.peek(16)[:16])
        self.source = buffered if self.compression is None else _decompress(buffered, self.compression)
        self.produced, self.head = 0, b""
        while len(self.head) < HEAD_BYTES and (block := self._read(HEAD_BYTES - len(self.head))):
            self.head += block
        self.is_whole, self.rest = len(self.head) < HEAD_BYTES, self.head
        self.is_table = self.head.startswith(PARQUET)

    def _read(self, size: int) -> bytes:
        block: bytes = self.source.read(size)
        self.produced += len(block)
        if self.compression is not None and len(block):
            self.bounds.check_expansion(self.produced, self.raw.consumed, str(self.path))
        return block

    def check_text(self, block: bytes) -> None:
        """Raise InvalidValue where the bytes are no text's."""
        if b"\0" in block:
            raise _refused(self.path, "binary data (NUL bytes)")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.rest:
            self.rest = self._read(len(buffer))
            if not self.binary and not self.is_table:
                self.check_text(self.rest)
        count = min(len(buffer), len(self.rest))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


def _compression(path: Path, beginning: bytes) -> str | None:
    """Return the compression by the content, or else by the name: what is called .gz and is not is damaged."""
    if not beginning:
        return None
    for name, pattern in COMPRESSED.items():
        if pattern.match(beginning):
            return name
    return COMPRESSIONS.get(path.suffix.lower())


def _decompress(file: BinaryIO, compression: str) -> BinaryIO:
    if compression == "gzip":
        return cast(BinaryIO, gzip.open(file, "rb"))
    if compression == "bz2":
        return cast(BinaryIO, bz2.open(file, "rb"))
    if compression in ("xz", "lzma"):
        return cast(BinaryIO, lzma.open(file, "rb"))
    # Unlike the zstandard package's readers, pyarrow's says when the file ends too early.
    stream = import_optional("pyarrow", "pyarrow").CompressedInputStream(file, "zstd")
    return cast(BinaryIO, io.BufferedReader(stream))
