"""What servers may answer: compressed, redirected, whole instead of a part, without end; and what is said then."""

import gzip
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.untrusted import MIB
from datamodules import remote
from datamodules.index import INDEX_BYTES, CorpusError
from datamodules.remote import RemoteFolder
from datamodules.shard_cache import OWN, ShardCache
from datamodules.shards import Split, open_split
from datamodules.storage import read_index
from tests.support.runs import SHARD
from tests.support.servers import Server, http_server

FILE = "train-00003.npy"


@pytest.fixture
def server(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "CHUNK", 3000)  # so that a shard takes three requests
    monkeypatch.setattr(remote, "WAITS", (0.001,) * 5)
    with http_server(corpus) as server:
        yield server


def folder_of(server: Server, cache: Path) -> RemoteFolder:
    return RemoteFolder(server.address, ShardCache(cache, 10**9))


def shard(split: Split) -> list[int]:
    return split.slice(3 * SHARD, 4 * SHARD).tolist()


def ours(corpus: Path) -> list[int]:
    return shard(open_split(corpus, "train"))


def test_a_refusal_says_the_status_wherever_it_comes(server: Server, tmp_path: Path) -> None:
    """For the size of a file too, where fsspec says FileNotFoundError; asked again, as it may pass."""
    reason = r"cannot be read: HTTP status 503 Service Unavailable \(6 attempts\)"
    server.unavailable.add(FILE)
    with pytest.raises(CorpusError, match=f"{server.address}/{FILE} {reason}") as error:
        open_split(folder_of(server, tmp_path), "train")
    assert str(error.value).count(server.address) == 1
    server.unavailable.add("index.json")
    with pytest.raises(CorpusError, match=f"{server.address}/index.json {reason}"):
        read_index(folder_of(server, tmp_path))


def test_what_is_not_there_is_said_at_once(server: Server, tmp_path: Path) -> None:
    storage = RemoteFolder(f"{server.address}/nowhere", ShardCache(tmp_path, 10**9))
    with pytest.raises(CorpusError, match=r"/nowhere/index.json cannot be read: HTTP status 404 Not Found$"):
        read_index(storage)


def test_nothing_compressed_is_asked_for(server: Server, corpus: Path, tmp_path: Path) -> None:
    assert shard(open_split(folder_of(server, tmp_path), "train")) == ours(corpus)
    assert server.encodings == {"identity"}


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_compresses_all_the_same(server: Server, corpus: Path, tmp_path: Path, ranges: bool) -> None:
    """A whole file is unpacked; a part of a compressed file is of no use, which is said."""
    server.zipping = {path.name for path in corpus.iterdir()}
    server.ranges = ranges
    assert read_index(folder_of(server, tmp_path)) == read_index(open_split(corpus, "train").storage)
    split = open_split(folder_of(server, tmp_path), "train")
    if not ranges:
        assert shard(split) == ours(corpus)
        return
    with pytest.raises(CorpusError, match=f"{FILE} cannot be read: (EOFError: a part of the file came, compressed|C)"):
        shard(split)


def test_a_small_answer_that_unfolds_to_a_large_one_is_not_unfolded(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 MB of spaces in 200 kB."""
    (tmp_path / "bomb").mkdir()
    (tmp_path / "bomb/index.json").write_bytes(b" " * 200_000_000)
    server.folder, server.zipping = tmp_path / "bomb", {"index.json"}
    assert len(gzip.compress(b" " * 200_000_000)) < 200_000
    tracemalloc.start()
    with pytest.raises(CorpusError, match=r"has more than 67,108,864 bytes; the bound is .* READ_LIMITS=10"):
        read_index(folder_of(server, tmp_path / "cache"))
    assert tracemalloc.get_traced_memory()[1] < 2.5 * INDEX_BYTES + 1000 * MIB  # the server's copies are ours too
    tracemalloc.stop()


def test_an_index_without_end_is_given_up(server: Server, tmp_path: Path) -> None:
    server.endless["index.json"] = MIB
    with pytest.raises(CorpusError, match=r"index.json has more than 67,108,864 bytes; the bound is 67,108,864"):
        read_index(folder_of(server, tmp_path))
    assert server.sent < 2 * INDEX_BYTES


def test_a_shard_without_end_is_given_up(server: Server, tmp_path: Path) -> None:
    split = open_split(folder_of(server, tmp_path), "train")
    server.endless[FILE] = MIB
    with pytest.raises(CorpusError, match=f"{FILE} is damaged: its sha256 is not the index's"):
        shard(split)
    assert server.sent < 200 * MIB
    assert sum(path.stat().st_size for path in (tmp_path / OWN).iterdir()) < MIB


@pytest.mark.parametrize("name", ["index.json", FILE])
def test_what_comes_too_slowly_to_end_is_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(remote, "PATIENCE", 0.3)
    split = open_split(folder_of(server, tmp_path), "train")
    server.endless[name] = 1
    with pytest.raises(CorpusError, match=rf"{name} cannot be read: TimeoutError: only \d+ bytes came in .*6 attempts"):
        shard(split) if name == FILE else read_index(folder_of(server, tmp_path))


def test_a_part_that_is_another_one_is_refused(server: Server, tmp_path: Path) -> None:
    split = open_split(folder_of(server, tmp_path), "train")
    server.shifted.add(FILE)
    reason = r"EOFError: bytes 0 to 2999 were asked for, and bytes 8-2999/8320 came \(6 attempts\)"
    with pytest.raises(CorpusError, match=f"{FILE} cannot be read: {reason}"):
        shard(split)


def test_whole_files_instead_of_parts_are_taken_and_not_held(server: Server, corpus: Path, tmp_path: Path) -> None:
    """Status 200 for a range: the file is taken from its beginning, also where a part of it was there."""
    server.ranges = False
    split = open_split(folder_of(server, tmp_path), "train")
    split.storage.keep([])  # which makes the folder
    content = (corpus / FILE).read_bytes()
    (tmp_path / OWN / f"{split.files.shards[3].sha256}.{len(content)}.part").write_bytes(content[:5000])
    assert shard(split) == ours(corpus)
    assert server.fetched[FILE] == len(content), "once"


def test_redirects_are_followed_and_secrets_stay(server: Server, corpus: Path, tmp_path: Path) -> None:
    """To another server, as that of a bucket's files is; what is meant for the first is not said to the second."""
    with http_server(corpus) as other:
        server.elsewhere = {path.name: f"{other.address}/{path.name}" for path in corpus.iterdir()}
        address = server.address.replace("http://", "http://user:secret@")
        storage = RemoteFolder(address, ShardCache(tmp_path, 10**9))
        assert shard(open_split(storage, "train")) == ours(corpus)
        assert other.fetched[FILE] == (corpus / FILE).stat().st_size
        assert server.secrets - {None}
        assert not other.secrets - {None}


def test_a_redirect_in_a_circle_ends(server: Server, tmp_path: Path) -> None:
    server.elsewhere["index.json"] = "/index.json"
    with pytest.raises(CorpusError, match=r"index.json cannot be read: it is redirected too often$"):
        read_index(folder_of(server, tmp_path))


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/index.json", "data:,{}"])
def test_a_redirect_leads_to_no_other_kind_of_address(server: Server, tmp_path: Path, target: str) -> None:
    server.elsewhere["index.json"] = target
    with pytest.raises(CorpusError, match=r"index.json cannot be read: \w+"):
        read_index(folder_of(server, tmp_path))


@pytest.mark.parametrize("address", ["filecache::http://127.0.0.1:1/x", "zip://a.zip::http://127.0.0.1:1/x"])
def test_a_chain_of_file_systems_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.path=.* an address of one file system"):
        read_index(RemoteFolder(address, ShardCache(tmp_path, 1)))
