"""Corpora from a stranger: an index of any numbers, files of any content. Refused at the start, at once, in a line."""

import json
import os
import pickle
import random
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import UserError
from core.untrusted import MIB
from datamodules.index import ArrayFile, Index, parse_index
from datamodules.remote import RemoteFolder
from datamodules.shard_cache import ShardCache
from datamodules.shards import open_split
from datamodules.storage import LocalFolder, load, read_index
from datamodules.writer import write_corpus
from tests.support.forked import python
from tests.support.runs import DESCRIPTION, ROOT, documents, tiny_job, train
from tests.support.servers import http_server

SHA = "0" * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus", documents(), 256, DESCRIPTION, 4096)
    return tmp_path / "corpus"


def change(folder: Path, **fields: Any) -> None:
    """Set fields of the index; a double underscore goes one level down."""
    path = folder / "index.json"
    content = json.loads(path.read_text())
    for name, value in fields.items():
        node = content
        *above, last = name.split("__")
        for part in above:
            node = node[int(part) if isinstance(node, list) else part]
        node[last] = value
    path.write_text(json.dumps(content))


def split_of(num_tokens: int, pages: int, shards: list[int]) -> dict[str, Any]:
    return {
        "num_tokens": num_tokens,
        "num_documents": 1,
        "num_bytes": 1,
        "shards": [{"file": f"{i}.npy", "length": length, "sha256": SHA} for i, length in enumerate(shards)],
        "documents": {"file": "d.npy", "length": 1, "sha256": SHA},
        "checksums": {"file": "c.npy", "length": pages, "sha256": SHA},
    }


def index_of(shard_tokens: int, page_tokens: int, split: dict[str, Any]) -> bytes:
    content = {"version": 2, "dtype": "uint16", "vocab_size": 257, "end_of_document": 256}
    content |= {"shard_tokens": shard_tokens, "page_tokens": page_tokens, "splits": {"train": split, "val": split}}
    return json.dumps(content).encode()


BIG = 10**15


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (index_of(1, 1, split_of(10**18, 10**18, [])), "num_tokens=1000000000000000000: Input should be less than"),
        (index_of(1, 1, split_of(BIG, BIG, [])), "the shards of train do not add up to its 1000000000000000 tokens"),
        (index_of(BIG, 1, split_of(BIG, BIG, [BIG])), "1,000,000,000,000,000 pages in train; the bound is 67,108,864"),
        (index_of(BIG, BIG, split_of(BIG, 10**9, [BIG])), "has 1000000000 checksums, which is not one a page"),
        (b"[" * 5000 + b"]" * 5000, "nested more than 200 levels deep"),
        (b'{"version": 2, "made": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested more than 200 levels deep"),
        (b"[" * 10**6, "nested more than 200 levels deep"),
        (b'{"version": ' + b"2" * 10**6 + b"}", "number out of range"),
        (b"\xff\xfe", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_an_index_that_promises_too_much_costs_nothing(text: bytes, reason: str) -> None:
    tracemalloc.start()
    with pytest.raises(UserError, match=f"^here .*{reason}"):
        parse_index(text, "here")
    assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("splits__val__num_bytes", value) for value in ("x", None, -1, 1.5, True, 10**20, [])),
        *(("splits__train__num_tokens", value) for value in ("9", -1, 1e18)),
        *(("vocab_size", value) for value in ("257", 0, -1, 257.0, None, 10**9)),
        *(("page_tokens", value) for value in (0, -1, "1", 3)),
        *(("end_of_document", value) for value in (-1, 257, "x", None)),
        *(("dtype", value) for value in ("float16", "object", 3, None, "O8")),
        *(("tokenizer_file", value) for value in ("../x", "/etc/passwd", "", 3, "a/b", "a\0b")),
        *(("tokenizer_sha256", value) for value in ("x", 3)),
        *(("splits__val__shards", value) for value in ({}, [3], [{}], None)),
        ("splits__val__documents__length", 10**6),
        ("splits__val__num_documents", 10**6),
        *(("splits", value) for value in ([], {}, {"train": {}})),
        *(("version", value) for value in (True, "2", None, [], 2.5)),
        *(("made", value) for value in (3, [])),
        ("more", 1),
    ],
)
def test_an_odd_index_is_refused_before_anything_is_trained(folder: Path, field: str, value: Any) -> None:
    change(folder, **{field: value})
    with pytest.raises(UserError, match=r"^[^\n]*index\.json[^\n]*$"):
        open_split(folder, "val")


def test_the_command_line_says_it_before_it_trains(folder: Path, tmp_path: Path) -> None:
    change(folder, splits__val__num_bytes="x")
    job = [argument for argument in tiny_job() if not argument.startswith("data.root=")]
    ended = train(tmp_path, *job, "data=shards", f"data.path={folder}", "run_dir=run")
    assert ended.code == 2
    reason = "splits.val.num_bytes='x': Input should be a valid integer"
    assert ended.err == f"Error: {folder}/index.json cannot be read: {reason}\n"
    assert not (tmp_path / "run").exists()


def test_a_corpus_without_a_byte_of_text_has_no_bits_per_byte(folder: Path, tmp_path: Path) -> None:
    from datamodules.shard_corpus import ShardCorpus

    change(folder, splits__val__num_bytes=0)
    assert ShardCorpus(str(folder), 64, 4).bits_per_byte(1.0) is None


def replace(path: Path, content: bytes) -> None:
    """Of the same size, so that only the content tells."""
    size = path.stat().st_size
    path.write_bytes(content[:size].ljust(size, b"\0"))


def archive(path: Path) -> None:
    size = path.stat().st_size
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.npy", bytes(size))
    replace(path, path.read_bytes())
    os.truncate(path, size)


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("canary",)


CONTENTS: dict[str, Callable[[Path], None]] = {
    "zip magic": lambda path: replace(path, b"PK\x03\x04"),
    "empty zip magic": lambda path: replace(path, b"PK\x05\x06"),
    "an archive": archive,
    "a pickle": lambda path: replace(path, pickle.dumps(Canary())),
    "an object array": lambda path: replace(path, header("{'descr': '|O', 'fortran_order': False, 'shape': (9,)}")),
    "a shape of 2^62": lambda path: replace(
        path, header("{'descr': '<u2', 'fortran_order': False, 'shape': (4611686018427387904,)}")
    ),
    "a shape below zero": lambda path: replace(
        path, header("{'descr': '<u2', 'fortran_order': False, 'shape': (-1,)}")
    ),
    "a shape of no numbers": lambda path: replace(
        path, header("{'descr': '<u2', 'fortran_order': False, 'shape': ('x',)}")
    ),
    "a nested header": lambda path: replace(path, header("(" * 4000 + ")" * 4000)),
    "a header that calls": lambda path: replace(path, header("__import__('os').mkdir('canary')")),
    "a header of 64 KiB": lambda path: replace(path, b"\x93NUMPY\x02\x00\x00\x00\x01\x00" + b"{" * 65536),
    "a later version": lambda path: replace(path, b"\x93NUMPY\x09\x00"),
    "nothing": lambda path: replace(path, b""),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("file", ["train-00001.npy", "train.checksums.npy"])
def test_a_file_of_another_content_is_refused_and_never_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str
) -> None:
    monkeypatch.chdir(tmp_path)
    CONTENTS[name](folder / file)
    with pytest.raises(UserError, match=rf"^[^\n]*{file} cannot be read: [^\n]*$"):
        open_split(folder, "train")
    assert not (tmp_path / "canary").exists()


def test_an_archive_of_a_larger_size_is_refused_where_only_the_content_tells(folder: Path) -> None:
    path = folder / "train-00001.npy"
    path.write_bytes(b"PK\x03\x04" + bytes(10**4))
    files = read_index(LocalFolder(folder)).splits["train"].shards
    with pytest.raises(UserError, match="cannot be read"):
        load(path, files[1], "uint16", "")


@pytest.mark.parametrize("version", [2, 3])
def test_a_header_that_announces_much_is_refused_before_it_is_read(tmp_path: Path, version: int) -> None:
    length, path = 64 * MIB, tmp_path / "x.npy"
    path.write_bytes(b"\x93NUMPY" + bytes([version, 0]) + length.to_bytes(4, "little"))
    os.truncate(path, length + 128)  # of which nothing but the first bytes takes room on the disk
    tracemalloc.start()
    with pytest.raises(UserError, match=r"x\.npy cannot be read: its header has 67,108,876 bytes, where 128 are"):
        load(path, ArrayFile("x.npy", length // 2, SHA), "uint16", "")
    assert tracemalloc.get_traced_memory()[1] < MIB
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("file", ["index.json", "train-00001.npy", "train.checksums.npy"])
def test_what_is_no_file_is_refused_and_not_waited_for(folder: Path, kind: str, file: str) -> None:
    path = folder / file
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=file):
        open_split(folder, "train")


def test_an_index_larger_than_its_bound_is_not_read(folder: Path) -> None:
    os.truncate(folder / "index.json", 1 << 40)
    with pytest.raises(UserError, match=r"index.json has more than 67,108,864 bytes; the bound is .*READ_LIMITS=10"):
        open_split(folder, "train")


def test_a_remote_corpus_that_promises_too_much_is_refused_before_it_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served/index.json").write_bytes(index_of(BIG, 1, split_of(BIG, BIG, [BIG])))
    with http_server(tmp_path / "served") as server:
        storage = RemoteFolder(server.address, ShardCache(tmp_path / "cache", 10**9))
        with pytest.raises(UserError, match=rf"^{server.address}/index.json has .* pages in train"):
            open_split(storage, "train")
        assert server.asked == {"index.json"}
    assert not (tmp_path / "cache").exists()


def test_mutated_indexes_are_read_or_refused(folder: Path) -> None:
    """Every byte may be another one: a whole index, or an error of the user's kind in a line."""
    good, draw = (folder / "index.json").read_bytes(), random.Random(0)
    for _ in range(1500):
        content = bytearray(good)
        for _ in range(draw.randint(1, 3)):
            start = draw.randrange(len(content))
            content[start : start + draw.randint(0, 4)] = draw.choice(
                [b"9" * 20, b"-", b"null", b"[", b"}", b'"', draw.randbytes(2), b"1e9", b""]
            )
        try:
            assert isinstance(parse_index(bytes(content), "here"), Index)
        except UserError as error:
            line = str(error)
            assert line.startswith("here ")
            assert "\n" not in line


def test_inspect_shows_foreign_text_as_text(folder: Path, tmp_path: Path) -> None:
    evil = "\x1b]0;x\x07[/x][red]\u202e"
    change(folder, source=evil, tokenizer=evil, made={evil: evil})
    copy = tmp_path / "[red] corpus"
    shutil.copytree(folder, copy)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import runpy; runpy.run_module('tools.prepare', run_name="
    ended = python(tmp_path, "-c", f"{code}'__main__')", "inspect", copy.name)
    assert ended.code == 0, ended.err
    assert not set(ended.out) & {"\x1b", "\x07", "\u202e"}
    assert "[/x][red]" in ended.out


@pytest.mark.parametrize("ends", [[-5, 3], [3, 2], [10**9], [0, 0], [1, 2]])
def test_inspect_refuses_ends_of_documents_that_are_none(folder: Path, ends: list[int]) -> None:
    from datamodules.preparation.inspect import statistics

    path = folder / "val.documents.npy"
    array = np.load(path)
    replaced = np.resize(np.array(ends, np.int64), len(array)) if len(array) else array
    path.write_bytes(path.read_bytes()[:128] + replaced.tobytes())
    with pytest.raises(UserError, match=r"its documents do not follow each other to the end"):
        statistics(LocalFolder(folder), "val")
