"""The command on files of users' own: what they hold decides, nothing is left out or kept without a word."""

import bz2
import gzip
import json
import lzma
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken

from core import cli
from core.errors import InvalidValue
from datamodules.preparation.bounds import Bounds
from datamodules.preparation.inputs import find_names
from datamodules.preparation.tables import texts_of_table
from datamodules.shards import open_split
from tests.support.runs import TEXT
from tests.support.tokenizer_files import byte_level, llama_like, without_bytes
from tools.prepare import main

LINES = TEXT.decode().splitlines(keepends=True)
TEXTS = ["".join(LINES[start : start + 10]) for start in range(0, 600, 10)]
RECORDS = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


class Prepared:
    """The command with what every call here has in common, and what it said."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys, self.number = folder, capsys, 0

    def __call__(self, name: object, *arguments: str, output: Path | None = None) -> Path:
        self.number += 1
        self.output = output or self.folder / f"out{self.number}"
        more = (f"output={self.output}", "processes=1", "validation=0.3")
        cli.run(lambda: main([f"input={self.folder / str(name)}", *more, *arguments]))
        self.said = self.capsys.readouterr().err
        return self.output

    def refused(self, name: object, *arguments: str) -> str:
        """The line of a command that fails, and leaves nothing."""
        with pytest.raises(SystemExit, match="2"):
            self(name, *arguments)
        self.said = self.capsys.readouterr().err
        assert not self.output.exists()
        assert not (self.folder / f".{self.output.name}.partial").exists()
        *_, line = self.said.splitlines()
        assert line.startswith("Error: ")
        return line

    def index(self) -> Any:
        return json.loads((self.output / "index.json").read_text())

    def documents(self) -> list[bytes]:
        """The texts of a byte corpus, sorted."""
        found = []
        for name in ("train", "val"):
            tokens = open_split(self.output, name).tokens
            pieces = np.split(tokens, np.flatnonzero(tokens == 256) + 1)[:-1]
            found += [bytes(piece[:-1].tolist()) for piece in pieces]
        return sorted(found)


@pytest.fixture
def prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Prepared:
    return Prepared(tmp_path, capsys)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return bytes(sink.getvalue())


WAYS: dict[str, bytes] = {
    "a.json": RECORDS,
    "a.JSONL": RECORDS,
    "a.Json.Gz": gzip.compress(RECORDS),
    "a.jsonl.xz": lzma.compress(RECORDS),
    "a.jsonl.lzma": lzma.compress(RECORDS, format=lzma.FORMAT_ALONE),
    "a.jsonl.bz2": bz2.compress(RECORDS),
    "a.jsonl.zstd": zstd(RECORDS),
    "a": RECORDS,
    "a.txt": gzip.compress(RECORDS),
    "list.json": json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
    "list.jsonl": json.dumps([{"text": text} for text in TEXTS]).encode(),
    "list": json.dumps([{"text": text} for text in TEXTS]).encode(),
    "list.txt": json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
    "mark.jsonl": b"\xef\xbb\xbf" + RECORDS,
    "carriage.jsonl": RECORDS.replace(b"\n", b"\r\n"),
}


@pytest.mark.parametrize("name", WAYS)
def test_json_is_read_by_its_content_whatever_its_name(name: str, prepare: Prepared) -> None:
    (prepare.folder / name).write_bytes(WAYS[name])
    prepare(name)
    assert prepare.documents() == sorted(text.encode() for text in TEXTS)


def test_a_first_record_longer_than_what_is_looked_at_is_json_too(prepare: Prepared) -> None:
    long = json.dumps({"id": 1, "text": "a" * 1_500_000}).encode() + b"\n"
    for name, content in (("a", long + RECORDS), ("b.txt", b"[" + b",".join((long + RECORDS).splitlines()) + b"]")):
        (prepare.folder / name).write_bytes(content)
        prepare(name)
        assert prepare.documents() == sorted([b"a" * 1_500_000, *(text.encode() for text in TEXTS)])


@pytest.mark.parametrize("content", [b'[{"a": 1}, 2]', b'[{"body": 1}]', b"[{it is no JSON", b'["text"]', b'{"n": 1}'])
def test_what_only_begins_like_json_is_text(content: bytes, prepare: Prepared) -> None:
    for number in range(20):
        (prepare.folder / f"{number}.txt").write_bytes(content + b"%d" % number)
    prepare("*.txt")
    assert len(prepare.documents()) == 20


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "lzma", "zst"])
def test_compressed_text_is_text(suffix: str, prepare: Prepared) -> None:
    content = "|".join(TEXTS).encode()
    ways = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}
    compressed = ways.get(suffix, lambda text: lzma.compress(text, format=lzma.FORMAT_ALONE))(content)
    (prepare.folder / f"a.TXT.{suffix.upper()}").write_bytes(compressed)
    prepare(f"a.TXT.{suffix.upper()}", "separator=|")
    assert prepare.documents() == sorted(text.encode() for text in "|".join(TEXTS).split("|") if text)
    (prepare.folder / f"cut.txt.{suffix}").write_bytes(compressed[:-20])
    assert "cannot be read" in prepare.refused(f"cut.txt.{suffix}")


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.csv.gz", "a.tsv.Bz2"])
def test_a_table_that_is_read_as_text_is_said(name: str, prepare: Prepared) -> None:
    content = b"|".join(b"number,text\n%d,a text\n" % n for n in range(30))
    packed = {".gz": gzip.compress, ".bz2": bz2.compress}.get(Path(name).suffix.lower(), bytes)(content)
    (prepare.folder / name).write_bytes(packed)
    prepare(name, "separator=|")
    assert f"tables read as plain text: 1, {prepare.folder / name} the first of them" in prepare.said


BINARY = {
    "a.png": (b"\x89PNG\r\n\x1a\nxyz", "a PNG image"),
    "a.txt": (b"%PDF-1.7\n", "a PDF document"),
    "b.txt": (b"text\0", "binary data (NUL bytes)"),
    "c.txt": (b"text\n" * 500_000 + b"\0", "binary data (NUL bytes)"),
    "a.jsonl": (b'\xff\xfe{\0"\0', "text in UTF-16"),
    "a.zip": (b"PK\x03\x04rest", "a zip archive"),
    "a.tar.gz": (gzip.compress(b"name" + b"x" * 253 + b"ustar\x0000"), "a tar archive"),
    "a.gz": (gzip.compress(gzip.compress(b"text")), "gzip-compressed data within gzip-compressed data"),
    "a.bin": (np.arange(5).tobytes(), "binary data (NUL bytes)"),
}


@pytest.mark.parametrize("name", BINARY)
def test_binary_content_is_refused_by_name(name: str, prepare: Prepared) -> None:
    content, kind = BINARY[name]
    (prepare.folder / name).write_bytes(content)
    line = prepare.refused(name)
    assert f"{name}' is not valid: holds {kind}" in line
    assert "format=text takes it as it is" in line


def test_any_bytes_are_text_where_that_is_asked_for(prepare: Prepared) -> None:
    (prepare.folder / "a.json").write_bytes(b"|".join(b'{"n": %d}\0' % n for n in range(30)))
    prepare("a.json", "format=text", "separator=|")
    assert prepare.documents() == sorted(b'{"n": %d}\0' % n for n in range(30))


def test_json_without_the_field_says_what_it_has(prepare: Prepared) -> None:
    (prepare.folder / "a.json").write_text(json.dumps({"name": "x", "version": 1}, indent=2))
    line = prepare.refused("a.json")
    assert "text_field='text' is not valid: expected a field with text" in line
    assert "a.json has name, version (format=text takes JSON for plain text)" in line
    (prepare.folder / "b.txt").write_text('{"body": "x"}\n{"body": "y"}\n')
    assert "b.txt, line 1 has body" in prepare.refused("b.txt")


NULLS = {
    "a.jsonl": lambda path: path.write_bytes(b'{"text": null}\n{"text": ""}\n' + RECORDS),
    "a.parquet": lambda path: pq.write_table(pa.table({"text": [None, "", *TEXTS]}), path),
    "a.json": lambda path: path.write_text(json.dumps([{"text": text} for text in (None, "", *TEXTS)])),
}


@pytest.mark.parametrize("name", [*NULLS, "hf:"])
def test_null_texts_are_left_out_and_counted(name: str, prepare: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(prepare.folder / "hub-cache"))
    if name == "hf:":
        (prepare.folder / "hub").mkdir()
        NULLS["a.jsonl"](prepare.folder / "hub/train.jsonl")
        prepare("", f"input=hf:{prepare.folder}/hub")
    else:
        NULLS[name](prepare.folder / name)
        prepare(name)
    assert prepare.documents() == sorted(text.encode() for text in TEXTS)
    assert "records left out because their text is null: 1; is empty: 1" in prepare.said
    assert prepare.index()["made"]["left_out"] == {"null": 1, "empty": 1}


COLUMNS: dict[str, Callable[[], Any]] = {
    "string": lambda: pa.array(TEXTS),
    "binary": lambda: pa.array([text.encode() for text in TEXTS]),
    "large string": lambda: pa.array(TEXTS, pa.large_string()),
    "large binary": lambda: pa.array([text.encode() for text in TEXTS], pa.large_binary()),
    "view": lambda: pa.array(TEXTS, pa.string_view()),
    "dictionary": lambda: pa.array(TEXTS).dictionary_encode(),
}


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("encoding", [None, "PLAIN", "DELTA_BYTE_ARRAY"])
def test_columns_of_text_are_read_however_they_are_stored(kind: str, encoding: str | None, prepare: Prepared) -> None:
    if kind == "dictionary" and encoding == "DELTA_BYTE_ARRAY":
        pytest.skip("pyarrow itself cannot read these two together")
    stored: dict[str, Any] = {} if encoding is None else {"use_dictionary": False, "column_encoding": encoding}
    pq.write_table(pa.table({"text": COLUMNS[kind]()}), prepare.folder / "a.parquet", row_group_size=25, **stored)
    prepare("a.parquet")
    assert prepare.documents() == sorted(text.encode() for text in TEXTS)


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array(range(3)), "int64"),
        (pa.array([["a"]]), "list<element: string>"),
        (pa.array([{"a": "b"}]), "struct<a: string>"),
        (pa.array([True]), "bool"),
    ],
    ids=str,
)
def test_other_columns_are_refused_and_the_corrected_command_goes_through(
    column: Any, kind: str, prepare: Prepared
) -> None:
    (prepare.folder / "in").mkdir()
    (prepare.folder / "in/b.jsonl").write_bytes(RECORDS)
    pq.write_table(pa.table({"text": column}), prepare.folder / "in/c.parquet")
    line = prepare.refused("in")
    assert f"text_field='text' is not valid: expected a column of text; that of {prepare.folder}/in/c.parquet" in line
    assert line.endswith(f" is {kind}")
    prepare("in/b.jsonl", output=prepare.output)


def test_text_in_parquet_that_is_no_utf8_is_as_in_a_file(prepare: Prepared) -> None:
    texts = [f"{n} gr\xfc\xdfe".encode("latin-1") for n in range(60)]
    column = pa.array(texts).view(pa.string())
    pq.write_table(pa.table({"text": column}), prepare.folder / "a.parquet")
    prepare("a.parquet")
    assert prepare.documents() == sorted(texts)
    line = prepare.refused("a.parquet", f"tokenizer={byte_level(prepare.folder / 't.json')}")
    assert "120 bytes that are no UTF-8" in line


def test_a_parquet_file_does_not_unfold(prepare: Prepared) -> None:
    """A megabyte that 10,000 rows share is 300 bytes on the disk; so are as many prefixes of one another."""
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 10_000, pa.int32()), pa.array(["a" * 1_000_000]))
    pq.write_table(pa.table({"text": shared}), prepare.folder / "a.parquet", compression="zstd")
    pq.write_table(
        pa.table({"text": ["a" * 1_000_000] * 200}),
        prepare.folder / "b.parquet",
        compression="zstd",
        use_dictionary=False,
        column_encoding="DELTA_BYTE_ARRAY",
    )
    for name in ("a.parquet", "b.parquet"):
        assert (prepare.folder / name).stat().st_size < 2000
        with pytest.raises(InvalidValue, match="more than 200 times as many; max_expansion=2000 allows more"):
            list(texts_of_table(prepare.folder / name, "text", Bounds()))
    assert "max_expansion=2000 allows more" in prepare.refused("a.parquet")


def test_a_compressed_file_does_not_unfold(prepare: Prepared) -> None:
    (prepare.folder / "a.txt.bz2").write_bytes(bz2.compress(b"a" * 100_000_000))
    assert "more than 200 times as many; max_expansion=2000 allows more" in prepare.refused("a.txt.bz2")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_has_a_depth_and_a_size(name: str, prepare: Prepared) -> None:
    (prepare.folder / name).write_text('{"text": "a", "x": ' + "[" * 200_000 + "]" * 200_000 + "}")
    assert "JSON nested deeper than the parser goes" in prepare.refused(name)
    (prepare.folder / name).write_text('{"text":\n' * (name == "a.json") + "[" + "0," * 600_000)
    assert "is longer than 1,000,000 bytes; max_record_mb=2 allows more" in prepare.refused(name, "max_record_mb=1")


def test_bytes_that_begin_no_character_are_read_in_linear_time(prepare: Prepared) -> None:
    """1 GB/s or so; where every piece was a byte, 24 MiB took half a minute, and with a separator no end."""
    for number in range(20):
        (prepare.folder / f"{number}.txt").write_text(f"a text {number}")
    (prepare.folder / "x.txt").write_bytes(b"\x80" * (12 << 20))
    for separator in ("null", "|"):
        started = time.process_time()
        prepare("*.txt", f"separator={separator}")
        assert time.process_time() - started < 10
        assert prepare.documents()[-1] == b"\x80" * (12 << 20)


def test_a_long_document_is_cut_in_linear_time(prepare: Prepared) -> None:
    with (prepare.folder / "a.jsonl").open("wb") as file:
        file.write(RECORDS + json.dumps({"text": "a" * 30_000_000}).encode())
    started = time.process_time()
    prepare("a.jsonl")
    assert time.process_time() - started < 15


def test_a_separator_that_never_matches_is_said(prepare: Prepared) -> None:
    for number in range(30):
        (prepare.folder / f"{number}.txt").write_bytes(b"one %d\r\n\r\ntwo" % number)
    prepare("*.txt", "separator=\\n\\n")
    assert r"separator='\\n\\n' stands nowhere in the text files" in prepare.said
    assert r"their lines end with \r\n" in prepare.said
    prepare("*.txt", "separator=\\r\\n\\r\\n")
    assert "separator" not in prepare.said
    assert len(prepare.documents()) == 60
    (prepare.folder / "a.jsonl").write_bytes(RECORDS)
    prepare("a.jsonl", "separator=x")
    assert "separator='x' was not used: no input is a text file" in prepare.said


def test_files_in_which_the_separator_stands_nowhere_are_counted_beside_others(prepare: Prepared) -> None:
    for number in range(30):
        (prepare.folder / f"{number}.txt").write_bytes(b"one %d\n\ntwo" % number)
    (prepare.folder / "empty.txt").touch()
    prepare("*.txt", "separator=\\n\\n")
    assert "separator" not in prepare.said
    (prepare.folder / "few.txt").write_bytes(b"a\nb")
    prepare("*.txt", "separator=\\n\\n")
    files = f"stands nowhere in 1 of 32 text files, {prepare.folder}/few.txt the first of them"
    assert f"separator='\\\\n\\\\n' {files}: each was one document\n" in prepare.said
    (prepare.folder / "carriage.txt").write_bytes(b"one\r\n\r\ntwo" * 200_000)
    prepare("*.txt", "separator=\\n\\n", "max_text_mb=2")  # which is reached with this file
    files = f"stands nowhere in 1 of 31 text files, {prepare.folder}/carriage.txt the first of them"
    assert rf"{files}: each was one document; lines of 1 of them end with \r\n" in prepare.said
    prepare("*.txt", "separator=\\n\\n")
    files = f"stands nowhere in 2 of 33 text files, {prepare.folder}/carriage.txt the first of them"
    assert rf"{files}: each was one document; lines of 1 of them end with \r\n" in prepare.said


def test_a_file_that_is_named_twice_is_read_once(prepare: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare.folder / "in"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"text {number}")
    (prepare.folder / "link").symlink_to(folder)
    os.link(folder / "0.txt", folder / "again.txt")
    monkeypatch.chdir(prepare.folder)
    prepare("", f"input={folder},in,link,./in/*.txt,in/0.txt")
    assert len(prepare.documents()) == 30
    assert "files named again, by another path or a link: 95; each was read once" in prepare.said


def test_a_dataset_that_is_named_twice_is_read_once(prepare: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(prepare.folder / "hub-cache"))
    monkeypatch.chdir(prepare.folder)
    folder = prepare.folder / "hub"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(RECORDS)
    (prepare.folder / "link").symlink_to(folder)
    names = (f"hf:{folder}", "hf:hub", "hf:./hub", "hf:hub/", "hf:link", "hf:hub:default")
    prepare("", f"input={','.join(names)}")
    assert len(prepare.documents()) == len(TEXTS)
    assert "by another path or a link: 5; each was read once" in prepare.said
    for names in (("hf:./hub", "hub"), ("link/train.jsonl", "hf:hub:default")):
        line = prepare.refused("", f"input={','.join(names)}")
        assert f"train.jsonl' is not valid: it is in {max(names, key=lambda n: n[:3] == 'hf:')} as well" in line


def test_names_of_one_dataset_elsewhere_are_the_same() -> None:
    assert find_names(["hf:name", "hf:name:default", "hf:name:other", "hf:org/name"]) == (
        ("hf:name", "hf:name:other", "hf:org/name"),
        1,
    )


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/urandom", "/dev/null"])
def test_a_device_is_refused(name: str, prepare: Prepared) -> None:
    assert f"input='{name}' is not valid: a device or socket, which may have no end" in prepare.refused(name)


@pytest.mark.parametrize("size", ["²", "12345678901234567890", "1" * 5000, "٣٠٠", "-300", "1e3", "1048577", ""])
def test_a_size_that_is_none_is_refused(size: str, prepare: Prepared) -> None:
    (prepare.folder / "a.jsonl").write_bytes(RECORDS)
    line = prepare.refused("a.jsonl", f"tokenizer=bpe:{size}")
    assert "expected bpe:N with N >= 257, and at most 1,048,576" in line


def test_what_a_tokenizer_does_not_have_is_refused_said_and_not_counted(prepare: Prepared) -> None:
    tokenizer = f"tokenizer={without_bytes(prepare.folder / 't.json', None)}"
    russian = [f"Это русский текст номер {n}" for n in range(60)]
    (prepare.folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in russian))
    line = prepare.refused("a.jsonl", tokenizer)
    lost = sum(len(letter.encode()) for text in russian for letter in text if letter not in f" {TEXT.decode()}")
    size = sum(len(text.encode()) for text in russian)
    assert f"{lost / size:.3%} of the text is not in the tokens: {lost:,} bytes of characters" in line
    allowed = re.findall(r"max_lost=0\.8\d", line)
    prepare("a.jsonl", tokenizer, *allowed)
    assert f"Note: {lost / size:.3%} of the text is not in the tokens" in prepare.said
    prepare("a.jsonl", tokenizer, output=prepare.output)  # it is there; without leave it would not have been made
    assert "was there already" in prepare.said
    assert f"Note: {lost / size:.3%} of the text is not in the tokens" in prepare.said
    splits = prepare.index()["splits"]
    assert splits["train"]["num_bytes"] + splits["val"]["num_bytes"] == size - lost, (
        "bits per byte counts what is there"
    )
    cli.run(lambda: main(["inspect", str(prepare.output)]))
    assert f"{lost / size:.3%} of the text is not in the tokens" in prepare.capsys.readouterr().out


@pytest.mark.parametrize(("share", "said"), [(0.0005, ""), (0.005, "Note: "), (0.05, "Note: ")])
def test_what_an_older_corpus_lacks_is_said_by_its_unknown_tokens(share: float, said: str, prepare: Prepared) -> None:
    """Made before the loss was measured: of its tokens so many stand for what the vocabulary does not have."""
    tokenizer = f"tokenizer={without_bytes(prepare.folder / 't.json', '<unk>')}"
    texts = [" ".join(text.split()) for text in TEXTS] * 4
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (prepare.folder / "known.jsonl").write_text(lines)
    prepare("known.jsonl", tokenizer)
    num_tokens = sum(split["num_tokens"] for split in prepare.index()["splits"].values())
    strange = json.dumps({"text": " ".join("Ж" * round(share * num_tokens))}, ensure_ascii=False)
    (prepare.folder / "a.jsonl").write_text(lines + strange)
    folder = prepare("a.jsonl", tokenizer, "max_lost=1")
    index = prepare.index()
    del index["made"]["lost"]
    (folder / "index.json").write_text(json.dumps(index))
    cli.run(lambda: main(["inspect", str(folder)]))
    found = prepare.capsys.readouterr().out
    assert "was not measured when this corpus was prepared" in found
    assert ("tokens stand for what the vocabulary does not have" in found) == bool(said)
    assert ("above the 1% up to which" in found) == (share > 0.01)


def test_a_little_is_said_and_very_little_is_not(prepare: Prepared) -> None:
    tokenizer = f"tokenizer={without_bytes(prepare.folder / 't.json', '<unk>')}"
    texts = [" ".join(text.split()) for text in TEXTS]  # a space at a text's beginning this tokenizer does drop
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    for share, is_said in ((0.002, True), (0.0005, False)):
        letters = "Ж" * int(len(lines) * share / 2)
        (prepare.folder / "a.jsonl").write_text(lines + json.dumps({"text": letters}, ensure_ascii=False))
        prepare("a.jsonl", tokenizer)
        assert ("is not in the tokens" in prepare.said) == is_said


def test_a_name_that_cannot_be_is_one_line(prepare: Prepared) -> None:
    (prepare.folder / "a.jsonl").write_bytes(RECORDS)
    assert "cannot be read (File name too long)" in prepare.refused("a" * 300)
    assert "cannot be read (File name too long)" in prepare.refused("a.jsonl", f"tokenizer={'a' * 300}")
    with pytest.raises(SystemExit):
        prepare("a.jsonl", output=prepare.folder / ("a" * 300))
    assert "a folder that can be written to (File name too long)" in prepare.capsys.readouterr().err
    assert "one of these is empty" in prepare.refused("", f"input={prepare.folder}/a.jsonl,")


def test_a_word_without_end_is_learned_from_in_linear_time(prepare: Prepared) -> None:
    for number in range(20):
        (prepare.folder / f"{number}.txt").write_text(f"a text {number}")
    (prepare.folder / "x.txt").write_text("ab" * 200_000 + " " * 200_000)
    started = time.process_time()
    prepare("*.txt", "tokenizer=bpe:300")
    assert time.process_time() - started < 20


def test_latin_1_is_refused_where_it_would_be_replaced(prepare: Prepared) -> None:
    (prepare.folder / "a.txt").write_bytes("|".join(f"Größe über {n}" for n in range(60)).encode("latin-1"))
    tokenizer = f"tokenizer={byte_level(prepare.folder / 't.json')}"
    assert "180 bytes that are no UTF-8" in prepare.refused("a.txt", "separator=|", tokenizer)
    prepare("a.txt", "separator=|")


def test_a_truncating_tokenizer_keeps_every_token(prepare: Prepared) -> None:
    def change(library: Any) -> None:
        library.enable_truncation(16)
        library.enable_padding(length=900)

    (prepare.folder / "a.jsonl").write_bytes(RECORDS)
    counts = []
    for path in (byte_level(prepare.folder / "t.json"), byte_level(prepare.folder / "u.json", change)):
        prepare("a.jsonl", f"tokenizer={path}")
        counts.append([split["num_tokens"] for split in prepare.index()["splits"].values()])
    assert counts[0] == counts[1]


def test_a_text_that_spells_the_end_ends_no_document(prepare: Prepared) -> None:
    def change(library: Any) -> None:
        library.add_tokens([AddedToken("<END>", special=False)])

    tokenizer = f"tokenizer={byte_level(prepare.folder / 't.json', change)}"
    for number in range(30):
        (prepare.folder / f"{number}.txt").write_text(f"some <END> text {number}")
    prepare("*.txt", tokenizer, "end_of_document=<END>")
    end = prepare.index()["end_of_document"]
    assert sum((open_split(prepare.output, name).tokens == end).sum() for name in ("train", "val")) == 30


def test_a_document_of_several_pieces_has_one_space_in_front(
    prepare: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer

    monkeypatch.setattr("datamodules.preparation.documents.PIECE_BYTES", 10_000)

    tokenizer = llama_like(prepare.folder / "t.json")
    text = "a word or a number\n" * 3000
    (prepare.folder / "a.txt").write_text(text)
    for number in range(20):
        (prepare.folder / f"{number}.txt").write_text(f"b {number}")
    prepare("*.txt", f"tokenizer={tokenizer}")
    tokens = max((open_split(prepare.output, name).tokens for name in ("train", "val")), key=len)
    longest = max(np.split(tokens, np.flatnonzero(tokens == 1)), key=len)
    assert longest[longest != 1].tolist() == Tokenizer.from_file(str(tokenizer)).encode(text).ids


def replaced_tokenizer(folder: Path) -> None:
    byte_level(folder / "t.json", lambda library: library.add_tokens(["more"]))


def edited_input(folder: Path) -> None:
    content = (folder / "in/0.txt").read_text()
    time.sleep(0.01)  # the clock of some file systems is coarse
    (folder / "in/0.txt").write_text(content[::-1])


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (replaced_tokenizer, "with another content of the tokenizer's file"),
        (edited_input, "from other inputs: a file's size or time of change is another"),
        (lambda folder: (folder / "in/new.txt").write_text("new"), "from other inputs"),
    ],
)
def test_a_corpus_of_other_inputs_is_not_reported_as_made(
    change: Callable[[Path], object], found: str, prepare: Prepared
) -> None:
    (prepare.folder / "in").mkdir()
    for number in range(30):
        (prepare.folder / f"in/{number}.txt").write_text(f"text {number}")
    command = ("in", f"tokenizer={byte_level(prepare.folder / 't.json')}")
    output = prepare(*command)
    assert "was there already" not in prepare.said
    prepare(*command, output=output)
    assert f"{output} was there already, made by this command from these inputs" in prepare.said
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    change(prepare.folder)
    with pytest.raises(SystemExit):
        prepare(*command, output=output)
    assert f"the corpus in this one was made in another way ({found}" in prepare.capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_a_corpus_of_before_times_were_noted_is_recognized(prepare: Prepared) -> None:
    """Its index has names and sizes of the inputs alone."""
    from datamodules.preparation.inputs import legacy_fingerprint
    from datamodules.preparation.prepare import _sha256

    (prepare.folder / "a.jsonl").write_bytes(RECORDS)
    output = prepare("a.jsonl")
    index = prepare.index()
    made = index["made"]
    for name in ("given_tokenizer_sha256", "lost", "left_out"):
        del made[name]
    del made["settings"]["format"]
    made["inputs_sha256"] = _sha256(legacy_fingerprint([str(prepare.folder / "a.jsonl")]))
    (output / "index.json").write_text(json.dumps(index))
    prepare("a.jsonl", output=output)
    assert "was there already" in prepare.said
    cli.run(lambda: main(["inspect", str(output)]))
    assert "was not measured when this corpus was prepared" in prepare.capsys.readouterr().out


def test_an_input_that_changes_while_it_is_read_is_refused(prepare: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    from datamodules.writer import SplitWriter

    (prepare.folder / "a.jsonl").write_bytes(RECORDS)
    append = SplitWriter.append

    def meanwhile(*arguments: Any) -> None:
        append(*arguments)
        os.utime(prepare.folder / "a.jsonl")

    monkeypatch.setattr(SplitWriter, "append", meanwhile)
    assert "a file of it was changed while it was read" in prepare.refused("a.jsonl")


def test_an_error_of_the_project_itself_leaves_nothing_in_the_way(
    prepare: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prepare.folder / "a.jsonl").write_bytes(RECORDS)
    with monkeypatch.context() as patch:
        patch.setattr("datamodules.writer.CorpusWriter.checkpoint", lambda *_: {}["fault"])
        with pytest.raises(KeyError):
            prepare("a.jsonl")
    prepare("a.jsonl", "shard_tokens=65536", output=prepare.output)


@pytest.mark.parametrize("content", ["", "{", "[" * 5000, "null"])
def test_settings_of_an_unfinished_preparation_that_cannot_be_read_are_in_nobodys_way(
    content: str, prepare: Prepared
) -> None:
    (prepare.folder / "a.jsonl").write_bytes(RECORDS)
    partial = prepare.folder / ".out1.partial"
    partial.mkdir()
    (partial / "settings.json").write_text(content)
    (partial / "progress.json").write_text("{")
    prepare("a.jsonl")
    assert not partial.exists()
    assert len(prepare.documents()) == len(TEXTS)


@pytest.mark.parametrize("name", ["", "train-00000.npy", "lock", "progress.json.draft"])
def test_no_link_leads_an_unfinished_preparation_out_of_its_folder(name: str, prepare: Prepared) -> None:
    """It may have come with the folder around it, and what is written would go to a file of the user's."""
    (prepare.folder / "a.jsonl").write_bytes(RECORDS)
    mine, partial = prepare.folder / "mine", prepare.folder / ".out1.partial"
    if name:
        mine.write_text("mine")
        partial.mkdir()
    else:
        mine.mkdir()
    (partial / name if name else partial).symlink_to(mine)
    with pytest.raises(SystemExit, match="2"):
        prepare("a.jsonl")
    assert "is a link or no regular file; delete it" in prepare.capsys.readouterr().err
    assert not list(mine.iterdir()) if mine.is_dir() else mine.read_text() == "mine"
    (partial / name if name else partial).unlink()
    prepare("a.jsonl", output=prepare.folder / "out1")


def test_nothing_comes_before_an_error_where_there_is_no_terminal(prepare: Prepared) -> None:
    (prepare.folder / "a.jsonl").write_text("{")
    prepare.refused("a.jsonl")
    assert prepare.said.count("\n") == 1
    assert prepare.said.startswith("Error: "), sys.stderr
