"""Corpora that lie elsewhere: the same tokens as here, whatever the server does, or an error of where and why."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from core.errors import ConfigError
from datamodules import remote
from datamodules.index import CorpusError
from datamodules.remote import RemoteFolder, open_storage
from datamodules.samples import ShuffledSplit
from datamodules.shard_cache import OWN, ShardCache
from datamodules.shard_corpus import ShardCorpus
from datamodules.shards import Split, open_split
from datamodules.storage import read_index
from datamodules.stream import SampleStream
from tests.support.runs import SHARD
from tests.support.servers import Server, http_server, s3_server
from tests.support.waiting import wait_for

SHARD_BYTES = 128 + 2 * SHARD
FILE = "train-00003.npy"
CHUNK = 3000  # so that a shard takes three requests


@pytest.fixture
def server(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "CHUNK", CHUNK)
    monkeypatch.setattr(remote, "WAITS", (0.001,) * 5)
    with http_server(corpus) as server:
        yield server


def remote_split(server: Server, cache: Path, limit: int = 10**9, name: str = "train") -> Split:
    return open_split(RemoteFolder(server.address, ShardCache(cache, limit)), name)


def read_shard(split: Split, shard: int = 3) -> list[int]:
    return split.slice(shard * SHARD, (shard + 1) * SHARD).tolist()


@pytest.mark.parametrize("ranges", [True, False])
def test_what_comes_by_http_is_what_lies_here(server: Server, corpus: Path, tmp_path: Path, ranges: bool) -> None:
    server.ranges = ranges
    for name in ("train", "val"):
        split = remote_split(server, tmp_path, name=name)
        np.testing.assert_array_equal(split.tokens, open_split(corpus, name).tokens)
        assert split.tokens.size, "a second time, from the cache"
    if ranges:
        sizes = {path.name: path.stat().st_size for path in corpus.iterdir() if path.name.endswith(("0.npy", "1.npy"))}
        assert sizes.items() <= dict(server.fetched).items(), "each byte once"


def test_what_comes_from_s3_is_what_lies_here(corpus: Path, tmp_path: Path) -> None:
    with s3_server(corpus) as bucket:
        address = bucket.address
        split = open_split(open_storage(address, ShardCache(tmp_path, 10**9)), "train")
        np.testing.assert_array_equal(split.tokens, open_split(corpus, "train").tokens)
        with pytest.raises(CorpusError, match=f"{address}-not/index.json cannot be read: FileNotFoundError"):
            read_index(RemoteFolder(f"{address}-not", ShardCache(tmp_path, 10**9)))


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("fault", ["failing", "truncating"])
def test_a_remote_that_fails_three_times_succeeds(
    server: Server, corpus: Path, tmp_path: Path, fault: str, ranges: bool
) -> None:
    server.ranges = ranges
    for name in ("index.json", FILE, "train.checksums.npy"):
        getattr(server, fault)[name] = 3
    assert read_shard(remote_split(server, tmp_path)) == read_shard(open_split(corpus, "train"))
    assert not any(getattr(server, fault).values())


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("failing", r"503.*\(6 attempts\)"), ("truncating", r"ContentLengthError|ClientPayloadError")],
)
def test_one_that_never_answers_ends_with_the_address_and_the_reason(
    server: Server, tmp_path: Path, fault: str, reason: str
) -> None:
    split = remote_split(server, tmp_path)
    getattr(server, fault)[FILE] = 10**9
    with pytest.raises(CorpusError, match=rf"{server.address}/{FILE} cannot be read: .*({reason})"):
        read_shard(split)
    getattr(server, fault)["index.json"] = 10**9
    with pytest.raises(CorpusError, match=rf"{server.address}/index.json cannot be read: .*({reason})"):
        remote_split(server, tmp_path)


def test_a_server_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS", (0.001,))
    storage = RemoteFolder("http://127.0.0.1:1/x", ShardCache(tmp_path, 10**9))
    with pytest.raises(CorpusError, match=r"127\.0\.0\.1:1/x/index.json cannot be read: .*Connect.* \(2 attempts\)"):
        read_index(storage)


def damaged(corpus: Path, folder: Path, content: bytes | None) -> Path:
    """A copy of the corpus with another shard 3, or none."""
    folder.mkdir()
    for path in corpus.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / FILE).unlink() if content is None else (folder / FILE).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (bytes(100), r"has 100 bytes, its index says 8320"),
        (None, r"cannot be read: HTTP status 404 Not Found"),
        (bytes(SHARD_BYTES), r"is damaged: its sha256 is not the index's"),
    ],
    ids=["truncated", "missing", "flipped"],
)
def test_a_damaged_shard_is_named_and_never_read(
    server: Server, corpus: Path, tmp_path: Path, content: bytes | None, reason: str
) -> None:
    server.folder = damaged(corpus, tmp_path / "damaged", content)
    with pytest.raises(CorpusError, match=rf"{server.address}/{FILE} {reason}"):
        read_shard(remote_split(server, tmp_path / "cache"))
    assert not list((tmp_path / "cache" / OWN).glob("*.npy")) or content == bytes(SHARD_BYTES)


def test_an_interrupted_fetch_goes_on_where_it_was(server: Server, corpus: Path, tmp_path: Path) -> None:
    split = remote_split(server, tmp_path)
    sha256 = split.files.shards[3].sha256
    split.storage.keep([])  # which makes the folder
    content = (corpus / FILE).read_bytes()
    for beginning, fetched in ((content[:5000], SHARD_BYTES - 5000), (bytes(5000), 2 * SHARD_BYTES - 5000)):
        server.fetched.clear()
        (tmp_path / OWN / f"{sha256}.npy").unlink(missing_ok=True)
        (tmp_path / OWN / f"{sha256}.{SHARD_BYTES}.part").write_bytes(beginning)
        assert read_shard(remote_split(server, tmp_path)) == read_shard(open_split(corpus, "train"))
        assert server.fetched[FILE] == fetched, "the rest; all, once the checksum has told that it is another file's"


def test_a_block_and_the_next_one_are_fetched_ahead(server: Server, corpus: Path, tmp_path: Path) -> None:
    """With the first sample asked for, all that the two blocks need comes; then the server may go."""
    size = 2 * SHARD // 64
    split = remote_split(server, tmp_path)
    samples, local = ShuffledSplit(split, 64, 0, size), ShuffledSplit(open_split(corpus, "train"), 64, 0, size)
    samples.read(np.arange(1))
    (lease,) = (tmp_path / OWN).glob("*.lease")
    held = lease.read_text().split()
    wait_for(lambda: all((tmp_path / OWN / f"{shard}.npy").exists() for shard in held))
    assert 4 <= len(held) <= 7, "two blocks of two shards, that may begin amid one, and the checksums"
    server.failing.update({path.name: 10**9 for path in corpus.iterdir()})
    for numbers in np.array_split(np.arange(2 * size), 8):
        np.testing.assert_array_equal(samples.read(numbers)["tokens"], local.read(numbers)["tokens"])
    assert set(lease.read_text().split()) != set(held), "the second block announces the third"


def test_data_loader_workers_share_the_cache(server: Server, corpus: Path, tmp_path: Path) -> None:
    def batches(split: Split) -> list[Any]:
        stream = SampleStream(ShuffledSplit(split, 64, 0, block=128), batch_size=8, num_batches=40)
        return [batch["tokens"] for batch in DataLoader(stream, batch_size=None, num_workers=workers)]

    workers, split = 2, remote_split(server, tmp_path)
    split.slice(0, 1)  # what the parent holds is not the workers'
    ours = batches(split)
    workers = 0
    assert all(map(torch.equal, ours, batches(open_split(corpus, "train"))))
    sizes = {path.name: path.stat().st_size for path in corpus.glob("train*.npy")}
    assert all(sizes[name] == count for name, count in server.fetched.items() if name in sizes), "each once"


@pytest.mark.parametrize(
    ("arguments", "field", "valid"),
    [
        ({"path": "gs://bucket/x"}, "data.path", "gcsfs is not installed: pip install gcsfs"),
        ({"path": "sftq://host/x"}, "data.path", "known are s3://, gs://"),
        ({"cache_gb": 0}, "data.cache_gb", "a number in"),
        ({"cache_gb": 1e-4}, "data.cache_gb", "at least 0.000"),
        ({"cache_gb": 5e-5, "shuffle_block": 64}, "data.cache_gb", "shuffle_block=64"),
    ],
)
def test_what_cannot_be_is_refused(
    server: Server, tmp_path: Path, arguments: dict[str, Any], field: str, valid: str
) -> None:
    defaults = {"path": server.address, "seq_len": 64, "batch_size": 4, "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ConfigError) as error:
        ShardCorpus(**{**defaults, **arguments}).check()
    assert error.value.field == field
    assert valid in error.value.valid
    assert not (tmp_path / "cache").exists(), "nothing is written"


def test_a_folder_that_cannot_be_written_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.*file/x.* a folder that can be written to"):
        remote_split(server, tmp_path / "file/x").slice(0, 1)
