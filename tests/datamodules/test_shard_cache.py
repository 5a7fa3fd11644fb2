"""The cache: below its size, nothing in use removed, one fetch a shard whoever needs it, and none lost to a kill."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import pytest

from datamodules import remote
from datamodules.index import CorpusError
from datamodules.remote import RemoteFolder
from datamodules.shard_cache import ShardCache
from datamodules.shards import open_split
from datamodules.writer import write_corpus
from tests.datamodules.servers import Server, http_server
from tests.helpers_run import DESCRIPTION, ROOT, documents

SIZE = 100
SHARD_BYTES = 128 + 2 * 4096


def content_of(shard: str) -> bytes:
    return shard.encode() * SIZE


class Remote:
    """Counts what is fetched from it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fetched = folder, ""

    def get(self, cache: ShardCache, shards: str, urgent: bool = True) -> str:
        """The shards, each a letter, that there are after asking for these in order."""
        for shard in shards:

            def fetch(part: FileIO, shard: str = shard) -> None:
                self.fetched += shard
                part.write(content_of(shard))

            path = cache.get(shard, SIZE, fetch, urgent)
            assert path is None or path.read_bytes() == content_of(shard)
            time.sleep(0.002)  # so that the times of use differ
        return "".join(sorted(path.stem for path in self.folder.glob("*.npy")))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Remote:
    return Remote(tmp_path)


def test_what_was_used_longest_ago_goes_first(elsewhere: Remote, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3 * SIZE)
    assert elsewhere.get(cache, "abc") == "abc"
    cache.hold("")
    assert elsewhere.get(cache, "a") == "abc"
    assert elsewhere.fetched == "abc"
    cache.hold("")
    assert elsewhere.get(cache, "d") == "acd"
    cache.hold("")
    assert elsewhere.get(cache, "bc") == "bcd"
    assert elsewhere.fetched == "abcdbc"


def test_nothing_in_use_is_removed_by_anyone(elsewhere: Remote, tmp_path: Path) -> None:
    """Another cache object is, to the locks, what another process is."""
    ours, theirs = ShardCache(tmp_path, 3 * SIZE), ShardCache(tmp_path, 3 * SIZE)
    elsewhere.get(ours, "ab")
    elsewhere.get(theirs, "c")
    assert elsewhere.get(theirs, "d", urgent=False) == "abc", "what is fetched ahead does not go beyond the limit"
    assert elsewhere.get(theirs, "d") == "abcd", "what is needed now does"
    theirs.hold("d")
    assert elsewhere.get(ours, "e", urgent=False) == "abd", "there is still too much"
    del theirs
    assert elsewhere.get(ours, "e", urgent=False) == "abe"
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix != ".npy"].count(".lease") == 1


def test_a_fetch_that_fails_leaves_its_beginning_to_the_next(elsewhere: Remote, tmp_path: Path) -> None:
    def fail(part: FileIO) -> None:
        part.write(b"a" * 7)
        raise CorpusError("no more")

    def go_on(part: FileIO) -> None:
        assert part.seek(0, os.SEEK_END) == 7
        part.write(b"a" * (SIZE - 7))

    cache = ShardCache(tmp_path, SIZE)
    with pytest.raises(CorpusError, match="no more"):
        cache.get("a", SIZE, fail)
    path = cache.get("a", SIZE, go_on)
    assert path is not None
    assert path.read_bytes() == content_of("a")


def test_an_unfinished_shard_counts_in_full_and_makes_room(elsewhere: Remote, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE)
    (tmp_path / f"z.{SIZE}.part").write_bytes(b"z")
    assert elsewhere.get(cache, "ab") == "ab"
    assert not list(tmp_path.glob("*.part"))


READER = """
import sys
from pathlib import Path
from datamodules import remote
from datamodules.shard_cache import ShardCache
from datamodules.shards import open_split

remote.CHUNK = 3000
print("ready", flush=True)
sys.stdin.readline()
split = open_split(remote.RemoteFolder(sys.argv[1], ShardCache(Path(sys.argv[2]), 10**9)), "train")
print(hash(split.tokens[: int(sys.argv[3])].tobytes()))
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "CHUNK", 3000)
    write_corpus(tmp_path / "tiny", documents(), 256, DESCRIPTION, 4096)
    with http_server(tmp_path / "tiny") as server:
        yield server


def start(server: Server, cache: Path, tokens: int) -> subprocess.Popen[str]:
    """A process that reads so many tokens once it gets a line."""
    command = [sys.executable, "-c", READER, server.address, str(cache), str(tokens)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "0"}, **pipes)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_processes_fetch_each_shard_once(server: Server, tmp_path: Path) -> None:
    readers = [start(server, tmp_path / "cache", 10**9) for _ in range(2)]
    for reader in readers:
        assert reader.stdin is not None
        reader.stdin.write("\n")
        reader.stdin.flush()
    said = [reader.communicate(timeout=120)[0] for reader in readers]
    assert said[0] == said[1] != ""
    for shard in open_split(tmp_path / "tiny", "train").files.shards:
        assert server.fetched[shard.file] == (tmp_path / "tiny" / shard.file).stat().st_size


def test_a_killed_fetch_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    server.seconds = 0.2
    with start(server, tmp_path / "cache", 10) as reader:
        assert reader.stdin is not None
        reader.stdin.write("\n")
        reader.stdin.flush()
        deadline = time.monotonic() + 60
        while server.fetched["train-00000.npy"] < 6000:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        reader.send_signal(signal.SIGKILL)
    (part,) = (tmp_path / "cache").glob("*.part")
    kept = part.stat().st_size
    assert kept >= 3000, "the first piece was written before the second was asked for"
    with http_server(tmp_path / "tiny") as other:  # the first one may still be answering the dead
        split = open_split(RemoteFolder(other.address, ShardCache(tmp_path / "cache", 10**9)), "train")
        assert split.slice(0, 4096).tolist() == open_split(tmp_path / "tiny", "train").slice(0, 4096).tolist()
    assert other.fetched["train-00000.npy"] == SHARD_BYTES - kept
    assert len(list((tmp_path / "cache").glob("*.lease"))) == 1, "that of the dead is cleared away"
