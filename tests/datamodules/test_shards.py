"""A corpus on disk: whole or not at all, and honest about what is wrong with it."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datamodules.shards import CorpusError, open_split, read_index, write_corpus
from tests.helpers_run import DESCRIPTION, ROOT, documents


@pytest.fixture
def folder(root: Path, tmp_path: Path) -> Path:
    """A copy of the corpus, to be damaged."""
    return shutil.copytree(root / "tiny", tmp_path / "corpus")


def test_what_is_written_is_read_back(folder: Path) -> None:
    for name in ("train", "val"):
        pieces = [(text, tokens) for split, text, tokens in documents() if split == name]
        split = open_split(folder, name)
        expected = np.concatenate([np.append(tokens, 256) for _, tokens in pieces])
        np.testing.assert_array_equal(split.tokens, expected)
        assert split.num_bytes == sum(len(text) for text, _ in pieces)
        assert read_index(folder)["splits"][name]["num_documents"] == len(pieces)
    assert {key: read_index(folder)[key] for key in DESCRIPTION} == DESCRIPTION


def test_windows_overlap_by_the_one_token_that_is_only_predicted(folder: Path) -> None:
    split = open_split(folder, "val")
    assert split.num_samples(10) == (split.num_tokens - 1) // 10
    windows = split.read(np.array([0, 1, split.num_samples(10) - 1]), seq_len=10)
    assert windows.shape == (3, 11)
    assert windows.dtype == np.int64
    np.testing.assert_array_equal(windows[:2].ravel(), [*split.tokens[:11], *split.tokens[10:21]])
    assert split.num_samples(split.num_tokens) == 0


def test_tokens_are_not_pickled(folder: Path) -> None:
    split = open_split(folder, "train")
    first = split.tokens[:5].tolist()
    pickled = pickle.dumps(split)
    assert len(pickled) < 1000 < split.num_tokens
    assert pickle.loads(pickled).tokens[:5].tolist() == first


def truncate(folder: Path) -> None:
    path = folder / "val.bin"
    path.write_bytes(path.read_bytes()[:-2])


def remove(folder: Path) -> None:
    (folder / "val.bin").unlink()


def make_newer(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "version": 2}))


def garble(folder: Path) -> None:
    (folder / "index.json").write_text("{")


def empty(folder: Path) -> None:
    (folder / "index.json").unlink()


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (truncate, "val.bin", r"has \d+ bytes, its index says \d+; delete"),
        (remove, "val.bin", "is missing"),
        (make_newer, "index.json", "has version 2; this code reads version 1"),
        (garble, "index.json", "cannot be read"),
        (empty, "index.json", "cannot be read"),
    ],
)
def test_damage_is_named_with_its_file(folder: Path, damage: Callable[[Path], None], file: str, reason: str) -> None:
    damage(folder)
    with pytest.raises(CorpusError, match=reason) as error:
        open_split(folder, "val")
    assert str(folder / file) in str(error.value)


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
    assert read_index(folder)["splits"]["train"]["num_documents"] == 4


WRITER = """
import sys, time
from pathlib import Path
import numpy as np
from datamodules.shards import write_corpus

folder = Path(sys.argv[1]) / "corpus"

def documents():
    # Until the other process writes too, or is done already: what it wrote may be gone between two looks.
    while len(list(folder.parent.glob(".corpus.*"))) < 2 and not folder.exists():
        time.sleep(0.01)
    for split in ("train", "val"):
        yield split, bytes(1000), np.zeros(1000, np.uint16)

write_corpus(folder, documents(), 256, {})
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
    assert sorted(path.name for path in (tmp_path / "corpus").iterdir()) == ["index.json", "train.bin", "val.bin"]
    assert [open_split(tmp_path / "corpus", name).num_tokens for name in ("train", "val")] == [1001, 1001]
