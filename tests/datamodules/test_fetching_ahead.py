"""The thread that fetches ahead: what each split needs stays, nothing goes beyond the limit, and nothing stops it."""

import fcntl
import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules import remote
from datamodules.index import ArrayFile, CorpusError
from datamodules.remote import RemoteFolder
from datamodules.shard_cache import NAMES, OWN, ShardCache, _size
from datamodules.shard_corpus import ShardCorpus
from datamodules.shards import Split, open_split
from tests.support.runs import ROOT, SHARD
from tests.support.servers import Server, http_server
from tests.support.waiting import wait_for

BYTES = 128 + 2 * SHARD


@pytest.fixture
def server(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "RETRY", 0.01)
    with http_server(corpus) as server:
        yield server


def fetched(cache: Path) -> set[str]:
    return {path.stem for path in (cache / OWN).glob("*.npy")}


def held(cache: Path) -> set[str]:
    """By anyone."""
    return {shard for lease in (cache / OWN).glob("*.lease") for shard in lease.read_text().split()}


def shards_of(split: Split) -> list[str]:
    return [shard.sha256 for shard in split.files.shards]


def remote_data(server: Server, cache: Path, **arguments: Any) -> ShardCorpus:
    """Whose cache has room for what it says that it uses, and not for a byte more."""
    sizes = {"seq_len": 64, "batch_size": 4, "val_batches": 10**6, "shuffle_block": SHARD // 64, **arguments}
    large = ShardCorpus(server.address, cache_dir=str(cache), **sizes)
    return ShardCorpus(server.address, cache_dir=str(cache), cache_gb=(large.bytes_in_use() + 0.5) / 1e9, **sizes)


def test_each_split_keeps_its_own_shards(server: Server, tmp_path: Path) -> None:
    data = remote_data(server, tmp_path)
    train, val = data.samples("train"), data.samples("val")
    for samples in (val, train, val, train):
        samples.read(np.arange(4))
        samples._announced = None  # announces again
    assert held(tmp_path) >= {*shards_of(val.split)}
    assert held(tmp_path) & {*shards_of(train.split)}


def test_a_run_with_its_baseline_stays_below_the_limit(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs, a validation after each, and what the summary asks for at the end."""
    fetch, used = RemoteFolder._fetch, []

    def measured(self: RemoteFolder, *arguments: Any) -> None:
        fetch(self, *arguments)
        with self.cache._locked():  # else a file that gets its name meanwhile counts twice
            ours = ((path, NAMES.fullmatch(path.name)) for path in self.cache.folder.iterdir())
            used.append(sum(_size(path, name) for path, name in ours if name))

    monkeypatch.setattr(RemoteFolder, "_fetch", measured)
    data = remote_data(server, tmp_path)
    data.check()
    samples, validation = data.samples("train"), data.val_dataloader()
    for numbers in np.array_split(np.arange(2 * samples.num_samples), 100):
        samples.read(numbers)
        if numbers[0] % samples.num_samples < 30:
            assert len(list(validation)) == data.num_val_batches
    assert data.baseline_loss() is not None
    assert data.cache.limit - BYTES < max(used) <= data.cache.limit


def storage_of(server: Server, cache: Path, limit: int = 10**9) -> tuple[RemoteFolder, Any]:
    """(a storage, its corpus' shards and their sizes)."""
    storage = RemoteFolder(server.address, ShardCache(cache, limit))
    return storage, [(shard, BYTES) for shard in open_split(storage, "train").files.shards]


def test_what_there_was_no_room_for_is_fetched_when_there_is(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get, refused = ShardCache.get, []

    def noting(self: ShardCache, shard: str, *arguments: Any, **options: Any) -> Path | None:
        path = get(self, shard, *arguments, **options)
        refused.extend([shard] if path is None else [])
        return path

    monkeypatch.setattr(ShardCache, "get", noting)
    storage, files = storage_of(server, tmp_path, 2 * BYTES)
    (first, _), (second, _), (third, _), *_ = files
    other = RemoteFolder(server.address, ShardCache(tmp_path, 2 * BYTES))
    other.path(first, BYTES)
    storage.keep(files[1:3])
    wait_for(lambda: refused[:2] == [third.sha256] * 2)
    assert fetched(tmp_path) == {first.sha256, second.sha256}
    del other
    wait_for(lambda: third.sha256 in fetched(tmp_path))
    assert fetched(tmp_path) == {second.sha256, third.sha256}


def test_what_somebody_else_fetches_is_passed_by_meanwhile(server: Server, tmp_path: Path) -> None:
    storage, files = storage_of(server, tmp_path)
    (first, _), (second, _), *_ = files
    storage.cache.hold([])  # which makes the folder
    with (tmp_path / OWN / f"{first.sha256}.{BYTES}.part").open("wb") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        storage.keep(files[:2])
        wait_for(lambda: second.sha256 in fetched(tmp_path))
        assert first.sha256 not in fetched(tmp_path)
    wait_for(lambda: first.sha256 in fetched(tmp_path))


def test_a_fault_in_the_thread_is_said_and_stops_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage, files = storage_of(server, tmp_path)
    (first, _), (second, _), *_ = files
    fetch = RemoteFolder._fetch

    def fail_once(self: RemoteFolder, file: ArrayFile, *arguments: Any) -> None:
        if file == first and threading.current_thread() is not threading.main_thread():
            raise RuntimeError("a bug")
        fetch(self, file, *arguments)

    monkeypatch.setattr(RemoteFolder, "_fetch", fail_once)
    storage.keep(files[:2])
    wait_for(lambda: second.sha256 in fetched(tmp_path))
    (record,) = caplog.records
    assert record.getMessage() == f"{server.address}/{first.file} was not fetched ahead"
    assert "RuntimeError: a bug" in caplog.text
    assert storage.path(first, BYTES).exists(), "whoever reads it tries again"


def test_what_the_server_refuses_is_left_to_whoever_reads_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote, "WAITS", ())
    storage, files = storage_of(server, tmp_path)
    (first, _), (second, _), *_ = files
    server.failing[first.file] = 10**9
    storage.keep(files[:2])
    wait_for(lambda: second.sha256 in fetched(tmp_path))
    assert not caplog.records
    with pytest.raises(CorpusError, match=rf"{first.file} cannot be read: .*503.* \(1 attempt\)"):
        storage.path(first, BYTES)


def test_the_thread_ends_with_its_storage(server: Server, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    storage, files = storage_of(server, tmp_path)
    storage.keep(files[:1])
    wait_for(lambda: files[0][0].sha256 in fetched(tmp_path))
    ours = [thread for thread in set(threading.enumerate()) - before if "_fetch_ahead" in thread.name]
    assert len(ours) == 1
    storage.keep(files[:2])
    assert sum("_fetch_ahead" in thread.name for thread in set(threading.enumerate()) - before) == 1, "the same one"
    del storage
    gc.collect()
    ours[0].join(60)
    assert not ours[0].is_alive()


LEAVES = """
import sys
from pathlib import Path
from datamodules import remote
from datamodules.index import ArrayFile, CorpusError
from datamodules.shard_cache import OWN, ShardCache
from datamodules.shards import open_split

remote.TIMEOUT = 1000
storage = remote.RemoteFolder(sys.argv[1], ShardCache(Path(sys.argv[2]), 10**9))
files = open_split(storage, "train").files.shards
storage.keep([(file, file.num_bytes("uint16")) for file in files])
print("announced", flush=True)
sys.stdin.readline()
"""


def test_a_process_leaves_while_its_thread_waits(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVES, server.address, str(tmp_path)]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout is not None
        server.hanging.add("train-00001.npy")
        assert process.stdout.readline() == "announced\n"
        wait_for(lambda: "train-00001.npy" in server.asked)
        out, err = process.communicate("\n", timeout=60)
    assert (process.returncode, out, err) == (0, "", "")
    assert held(tmp_path), "its lease is still there, and no longer locked"
    RemoteFolder(server.address, ShardCache(tmp_path, 10**9)).keep([])
    assert held(tmp_path) == set()
