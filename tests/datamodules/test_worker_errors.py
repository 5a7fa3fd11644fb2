"""What is wrong with the data is the same one line, whether train.py reads it itself or through a process."""

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils.data import get_worker_info

from datamodules import remote
from datamodules.index import CorpusError
from datamodules.samples import Numbers, Rows, ShuffledSplit
from datamodules.shards import Split, open_split
from datamodules.storage import LocalFolder
from datamodules.stream import SampleStream, StreamLoader
from datamodules.writer import write_corpus
from tests.support.runs import DESCRIPTION, documents, tiny_job, train
from tests.support.servers import http_server

SHARD = "train-00000.npy"
Run = Callable[[str], list[str]]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """In one shard of two pages."""
    write_corpus(tmp_path / "corpus", documents(), 256, DESCRIPTION)
    return tmp_path / "corpus"


@pytest.fixture
def messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Of a run that reads itself, and of one that has a process for it; both say where they read."""
    read = Split.read

    def noting(split: Split, *arguments: object) -> object:
        (tmp_path / f"read-{'here' if get_worker_info() is None else 'there'}").touch()
        return read(split, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Split, "read", noting)
    monkeypatch.setattr(remote, "WAITS", (0.001,) * 5)  # which the process, a fork, has too

    def run(path: str) -> list[str]:
        job = [argument for argument in tiny_job() if not argument.startswith("data.root=")]
        job += ["data=shards", f"data.path={path}", f"data.cache_dir={tmp_path}/cache"]
        said = []
        for workers, where in ((0, "here"), (1, "there")):
            finished = train(tmp_path, *job, f"data.num_workers={workers}", f"run_dir=run-{workers}")
            assert finished.code == 2, finished.err
            assert (tmp_path / f"read-{where}").exists()
            assert not (tmp_path / f"run-{workers}").exists()
            said.append(finished.err[finished.err.index("Error: ") :])
        return said

    return run


def truncate(corpus: Path) -> None:
    (corpus / SHARD).write_bytes((corpus / SHARD).read_bytes()[:5000])


def flip_bits(corpus: Path) -> None:
    content = bytearray((corpus / SHARD).read_bytes())
    for place in (5000, 140_000):  # one in each page
        content[place] ^= 1
    (corpus / SHARD).write_bytes(content)


def shrink_vocabulary(corpus: Path) -> None:
    index = json.loads((corpus / "index.json").read_text())
    (corpus / "index.json").write_text(json.dumps({**index, "vocab_size": 100, "end_of_document": 10}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "cannot be read: mmap length is greater than file size"),
        (flip_bits, "damaged, the checksum is not the index's"),
        (shrink_vocabulary, "is beyond the vocabulary of 100"),
    ],
)
def test_a_damaged_shard_is_one_line(
    corpus: Path, messages: Run, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], reason: str
) -> None:
    damage(corpus)
    monkeypatch.setattr(LocalFolder, "check", lambda *_: None)  # as if it had been whole when the run started
    here, there = messages(str(corpus))
    assert here == there
    assert here.count("\n") == 1
    assert SHARD in here
    assert reason in here


def test_a_remote_that_never_answers_is_one_line(corpus: Path, messages: Run) -> None:
    with http_server(corpus) as server:
        server.failing[SHARD] = 10**9
        here, there = messages(server.address)
    assert here == there
    assert here.startswith(f"Error: {server.address}/{SHARD} cannot be read: ")
    assert here.endswith(" (6 attempts)\n")
    assert here.count("\n") == 1


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_batches_before_it_come_as_they_are(corpus: Path, workers: int) -> None:
    class Ending(ShuffledSplit):
        def read(self, numbers: Numbers) -> Rows:
            if numbers.max() >= 20:
                raise CorpusError("the end")
            return super().read(numbers)

    before = set(multiprocessing.active_children())
    stream = SampleStream(Ending(open_split(corpus, "train"), 32, 0), batch_size=4)
    batches = iter(StreamLoader(stream, batch_size=None, num_workers=workers))
    seen = [next(batches)["tokens"].tolist() for _ in range(3)]
    with pytest.raises(CorpusError, match=r"^the end$"):
        next(batches)
    assert set(multiprocessing.active_children()) <= before, "they have ended, and nothing waits for them"
    whole = SampleStream(ShuffledSplit(open_split(corpus, "train"), 32, 0), batch_size=4)
    assert seen == [whole.read(number)["tokens"].tolist() for number in range(3)]
