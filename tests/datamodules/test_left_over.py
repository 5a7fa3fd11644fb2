"""A killed process leaves half a corpus behind; the next one removes it, and nothing that is being written."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from datamodules.writer import LOCK, _own_scratch, remove_left_over, write_corpus
from tests.support.runs import DESCRIPTION, ROOT, documents

WRITE = """
import sys, time
from pathlib import Path
import numpy as np
from datamodules.writer import write_corpus
def endless():
    while True:
        yield "train", b"a" * 100_000, np.zeros(100_000, np.uint16)
        print("wrote", flush=True)
write_corpus(Path(sys.argv[1]), endless(), 256, {"vocab_size": 257})
"""


def scratches(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.name.startswith(".")]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    command = [sys.executable, "-c", WRITE, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (left,) = scratches(tmp_path)
        remove_left_over(folder)
        assert left.exists(), "it is being written"
        process.send_signal(signal.SIGKILL)
    assert left.exists()
    write_corpus(folder, documents(), 256, DESCRIPTION)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    assert not (folder / LOCK).exists()


def test_who_opens_a_run_removes_nothing_where_the_run_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run from elsewhere may name any folder; the working folder's own `data` is where a new run tidies up too."""
    from core.open_run import open_data

    for name in ("anywhere", "data"):
        monkeypatch.chdir(tmp_path)
        node = {"_target_": "datamodules.python_stdlib.PythonStdlib", "root": name, "seq_len": 8, "batch_size": 1}
        data = open_data(OmegaConf.create({"data": node}))
        write_corpus(Path(name) / data.folder.name, documents(), 256, DESCRIPTION)
        left = Path(name) / f".{data.folder.name}.abcd_123"
        left.mkdir()
        (left / LOCK).touch()
        data = open_data(OmegaConf.create({"data": node}))
        assert data.root == Path(name)
        data.prepare_data()
        assert left.exists() == (name == "anywhere")


def test_train_removes_it_where_the_corpus_is_there_already(tmp_path: Path) -> None:
    from datamodules.python_stdlib import PythonStdlib

    data = PythonStdlib(str(tmp_path), seq_len=8, batch_size=1)
    write_corpus(data.folder, documents(), 256, DESCRIPTION)
    left = tmp_path / f".{data.folder.name}.abcd_123"
    left.mkdir()
    (left / LOCK).touch()
    (left / "train-00000.npy").write_bytes(bytes(1000))
    data.prepare_data()
    assert list(tmp_path.iterdir()) == [data.folder]


@pytest.mark.parametrize(("age", "is_removed"), [(0, False), (7200, True)])
def test_a_folder_without_a_lock_is_removed_when_it_is_old(age: float, is_removed: bool, tmp_path: Path) -> None:
    left = tmp_path / ".corpus.abcdefgh"
    left.mkdir()
    os.utime(left, (time.time() - age,) * 2)
    remove_left_over(tmp_path / "corpus")
    assert left.exists() != is_removed


@pytest.mark.parametrize(
    "name", [".corpus", ".corpus.partial", ".corpus.toolong99", ".other.abcdefgh", "corpus.abcdefgh"]
)
def test_folders_of_other_names_stay(name: str, tmp_path: Path) -> None:
    left = tmp_path / name
    left.mkdir()
    (left / LOCK).touch()
    os.utime(left, (0, 0))
    remove_left_over(tmp_path / "corpus")
    assert left.exists()


def test_writers_and_removers_at_once_are_not_in_each_others_way(tmp_path: Path) -> None:
    ended = threading.Event()

    def remove() -> None:
        while not ended.is_set():
            remove_left_over(tmp_path / "corpus")

    threads = [threading.Thread(target=remove) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        with _own_scratch(tmp_path / "corpus") as scratch:
            (scratch / "a").touch()
            time.sleep(0.0005)
            assert (scratch / "a").exists()
            assert (scratch / LOCK).exists()
    ended.set()
    for thread in threads:
        thread.join()
    remove_left_over(tmp_path / "corpus")
    assert not scratches(tmp_path)
