"""Writing a corpus: whole or not at all, in shards of any length, by several processes at once."""

import hashlib
import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from datamodules.index import HEADER_BYTES, SPLITS
from datamodules.shards import open_split
from datamodules.storage import LocalFolder, read_index
from datamodules.writer import CorpusWriter, GrowingArray, write_corpus
from tests.support.runs import DESCRIPTION, ROOT, documents


def stream(name: str) -> tuple[list[int], list[int], int]:
    """(tokens, document ends, bytes) of a split of the tiny corpus."""
    pieces = [text for split, text, _ in documents() if split == name]
    tokens = [token for text in pieces for token in [*text, 256]]
    return tokens, np.cumsum([len(text) + 1 for text in pieces]).tolist(), sum(map(len, pieces))


@pytest.mark.parametrize("shard_tokens", [512, 1000, 1 << 20])
def test_the_files_are_what_the_index_says(tmp_path: Path, shard_tokens: int) -> None:
    write_corpus(tmp_path / "corpus", documents(), 256, DESCRIPTION, shard_tokens)
    index = json.loads((tmp_path / "corpus/index.json").read_text())
    assert {key: index[key] for key in DESCRIPTION} == DESCRIPTION
    assert (index["version"], index["dtype"], index["end_of_document"]) == (2, "uint16", 256)
    for name in SPLITS:
        tokens, ends, num_bytes = stream(name)
        entry = index["splits"][name]
        shards = [np.load(tmp_path / "corpus" / shard["file"]) for shard in entry["shards"]]
        assert [len(shard) for shard in shards[:-1]] == [shard_tokens] * (len(shards) - 1)
        assert np.concatenate(shards).tolist() == tokens
        assert np.load(tmp_path / "corpus" / entry["documents"]["file"]).tolist() == ends
        size = index["page_tokens"]
        pages = [shard[start : start + size] for shard in shards for start in range(0, len(shard), size)]
        assert np.load(tmp_path / f"corpus/{name}.checksums.npy").tolist() == [zlib.crc32(p.tobytes()) for p in pages]
        assert (entry["num_tokens"], entry["num_documents"], entry["num_bytes"]) == (len(tokens), len(ends), num_bytes)
        for file in (*entry["shards"], entry["documents"], entry["checksums"]):
            content = (tmp_path / "corpus" / file["file"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == file["sha256"]


def test_it_is_made_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(tmp_path / "disk/corpus")
    write_corpus(tmp_path / "data", documents(), 256, DESCRIPTION)
    assert (tmp_path / "data").is_symlink()
    assert (tmp_path / "disk/corpus/index.json").is_file()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["corpus"]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_token_ids_are_as_wide_as_the_vocabulary_needs(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    tokens = np.array([vocab_size - 1], np.uint32)
    both = [(name, b"x", tokens) for name in SPLITS]
    write_corpus(tmp_path / "corpus", both, 0, {"vocab_size": vocab_size})
    split = open_split(tmp_path / "corpus", "train")
    assert split.tokens.dtype == dtype
    assert split.tokens.tolist() == [vocab_size - 1, 0]


def test_a_header_leaves_room_for_any_length(tmp_path: Path) -> None:
    array = GrowingArray(tmp_path / "a.npy", "uint16")
    array.append(np.arange(5))
    file = array.close()
    assert file.num_bytes("uint16") == HEADER_BYTES + 10 == (tmp_path / "a.npy").stat().st_size
    header = {"descr": "<u2", "fortran_order": False, "shape": (10**18,)}
    with (tmp_path / "b.npy").open("wb") as huge:
        np.lib.format.write_array_header_1_0(huge, header)
        assert huge.tell() == HEADER_BYTES


def test_a_writer_goes_on_from_the_last_checkpoint_of_another(tmp_path: Path) -> None:
    """What was written after the checkpoint, a finished shard among it, is written again."""
    everything = list(documents(20))
    write_corpus(tmp_path / "whole", everything, 256, DESCRIPTION, shard_tokens=4096)
    (tmp_path / "scratch").mkdir()
    description = {**DESCRIPTION, "end_of_document": 256}
    for first, checkpoint, stop in ((0, 3, 9), (3, 12, 12), (12, 20, 20)):
        writer = CorpusWriter(tmp_path / "scratch", description, shard_tokens=4096)
        assert writer.pieces == first
        for number, (name, text, tokens) in enumerate(everything[first:stop], start=first + 1):
            closed = np.append(tokens, 256)
            writer.splits[name].append(closed, np.array([len(closed)]), len(text))
            if number == checkpoint:
                writer.checkpoint(number)
        if stop == len(everything):
            writer.finish(tmp_path / "resumed")
        writer.abandon()
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def failing():
        yield from documents()
        raise KeyError("no more")

    with pytest.raises(KeyError):
        write_corpus(tmp_path / "corpus", failing(), 256, DESCRIPTION)
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_writers_wins(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"

    def overtaken():
        write_corpus(folder, documents(5), 256, DESCRIPTION)
        yield from documents(10)

    write_corpus(folder, overtaken(), 256, DESCRIPTION)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    assert read_index(LocalFolder(folder)).splits["train"].num_documents == 4


WRITER = """
import sys, time
from pathlib import Path
import numpy as np
from datamodules.writer import write_corpus

folder = Path(sys.argv[1]) / "corpus"

def documents():
    # Until the other process writes too, or is done already: what it wrote may be gone between two looks.
    while len(list(folder.parent.glob(".corpus.*"))) < 2 and not folder.exists():
        time.sleep(0.01)
    for split in ("train", "val"):
        yield split, bytes(1000), np.zeros(1000, np.uint16)

write_corpus(folder, documents(), 256, {"vocab_size": 257})
"""


def test_two_processes_may_prepare_the_same_corpus(tmp_path: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], cwd=ROOT) for _ in range(2)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    files = [f"{name}{kind}.npy" for name in SPLITS for kind in ("-00000", ".checksums", ".documents")]
    assert sorted(path.name for path in (tmp_path / "corpus").iterdir()) == sorted([*files, "index.json"])
    assert [open_split(tmp_path / "corpus", name).num_tokens for name in SPLITS] == [1001, 1001]
