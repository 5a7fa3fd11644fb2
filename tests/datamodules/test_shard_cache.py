"""The cache: below its size, nothing in use removed, one fetch a shard whoever needs it, and none lost to a kill."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from io import FileIO
from pathlib import Path

import pytest

from core.errors import ConfigError
from datamodules import remote
from datamodules.index import CorpusError
from datamodules.remote import RemoteFolder
from datamodules.shard_cache import OWN, ShardCache
from datamodules.shards import open_split
from datamodules.writer import write_corpus
from tests.support.runs import DESCRIPTION, ROOT, documents
from tests.support.servers import Server, http_server

SIZE = 100
SHARD_BYTES = 128 + 2 * 4096


def content_of(shard: str) -> bytes:
    return shard.encode() * SIZE


def named(shards: str) -> list[str]:
    """What the cache would call them: a checksum each."""
    return [shard * 64 for shard in shards]


class Remote:
    """Counts what is fetched from it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fetched = folder / OWN, ""

    def get(self, cache: ShardCache, shards: str, urgent: bool = True) -> str:
        """The shards, each a letter, that there are after asking for these in order."""
        for shard in shards:

            def fetch(part: FileIO, shard: str = shard) -> None:
                self.fetched += shard
                part.write(content_of(shard))

            path = cache.get(shard * 64, SIZE, fetch, urgent)
            assert path is None or path.read_bytes() == content_of(shard)
            time.sleep(0.002)  # so that the times of use differ
        return "".join(sorted(path.stem[0] for path in self.folder.glob("*.npy")))


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
    theirs.hold(named("d"))
    assert elsewhere.get(ours, "e", urgent=False) == "abd", "there is still too much"
    del theirs
    assert elsewhere.get(ours, "e", urgent=False) == "abe"
    assert [path.suffix for path in ours.folder.iterdir() if path.suffix != ".npy"].count(".lease") == 1


def test_a_fetch_that_fails_leaves_its_beginning_to_the_next(elsewhere: Remote, tmp_path: Path) -> None:
    def fail(part: FileIO) -> None:
        part.write(b"a" * 7)
        raise CorpusError("no more")

    def go_on(part: FileIO) -> None:
        assert part.seek(0, os.SEEK_END) == 7
        part.write(b"a" * (SIZE - 7))

    cache = ShardCache(tmp_path, SIZE)
    with pytest.raises(CorpusError, match="no more"):
        cache.get("a" * 64, SIZE, fail)
    path = cache.get("a" * 64, SIZE, go_on)
    assert path is not None
    assert path.read_bytes() == content_of("a")


def test_an_unfinished_shard_counts_in_full_and_makes_room(elsewhere: Remote, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE)
    cache.hold("")
    (cache.folder / f"{'f' * 64}.{SIZE}.part").write_bytes(b"z")
    assert elsewhere.get(cache, "ab") == "ab"
    assert not list(cache.folder.glob("*.part"))


READER = """
import sys
from pathlib import Path
from datamodules import remote
from datamodules.shard_cache import OWN, ShardCache
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
    (part,) = (tmp_path / "cache" / OWN).glob("*.part")
    kept = part.stat().st_size
    assert kept >= 3000, "the first piece was written before the second was asked for"
    with http_server(tmp_path / "tiny") as other:  # the first one may still be answering the dead
        split = open_split(RemoteFolder(other.address, ShardCache(tmp_path / "cache", 10**9)), "train")
        assert split.slice(0, 4096).tolist() == open_split(tmp_path / "tiny", "train").slice(0, 4096).tolist()
    assert other.fetched["train-00000.npy"] == SHARD_BYTES - kept
    assert len(list((tmp_path / "cache" / OWN).glob("*.lease"))) == 1, "that of the dead is cleared away"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_users_own_files_are_neither_removed_nor_counted(elsewhere: Remote, tmp_path: Path) -> None:
    """Beside the cache's own folder and in it, under names like its own; and behind links with such names."""
    cache = ShardCache(tmp_path, 2 * SIZE)
    elsewhere.get(cache, "a")
    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path, cache.folder):
        for name in ("array.npy", f"{'b' * 64}.npz", f"{'B' * 64}.npy", "x.100.part", "x.lease", f"{'0' * 31}.lease"):
            (folder / name).write_bytes(bytes(1000))
    (tmp_path / "elsewhere/mine.npy").write_bytes(bytes(1000))
    (cache.folder / f"{'f' * 64}.npy").symlink_to(tmp_path / "elsewhere/mine.npy")
    (cache.folder / f"{'f' * 32}.lease").symlink_to(tmp_path / "elsewhere/mine.npy")
    (tmp_path / f"{'9' * 64}.npy").write_bytes(bytes(1000))
    (cache.folder / f"{'8' * 64}.npy").mkdir()
    mine = {name: content for name, content in snapshot(tmp_path).items() if len(content) == 1000}
    cache.hold("")
    elsewhere.get(cache, "b")
    assert {"a", "b"} <= {path.stem[0] for path in cache.folder.glob("*.npy")}, "what is not ours is not counted"
    for shards in ("c", "d"):
        cache.hold("")
        elsewhere.get(cache, shards)
    assert mine.items() <= snapshot(tmp_path).items()
    assert len(mine) == 16


@pytest.mark.parametrize("how", ["somebody's", "a link", "another mark", "a file"])
def test_a_folder_that_the_cache_has_not_made_is_left_alone(tmp_path: Path, how: str) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / f"{'a' * 64}.npy").write_bytes(bytes(1000))
    own = tmp_path / "cache" / OWN
    own.parent.mkdir()
    if how == "a link":
        own.symlink_to(mine)
    elif how == "a file":
        own.write_bytes(b"mine")
    else:
        mine.rename(own)
        if how == "another mark":
            (own / "CACHEDIR.TAG").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=rf"data.cache_dir='{tmp_path}/cache' is not valid: .*leaves it as it is"):
        ShardCache(tmp_path / "cache", 1).get("b" * 64, SIZE, lambda part: None)
    assert snapshot(tmp_path) == before
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [OWN]


def test_an_older_cache_is_said_and_what_is_needed_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files lay in the given folder. One that is not what its name says, as a user's own might be, stays."""
    good, other = (sha256(bytes([n]) * SIZE).hexdigest() for n in (1, 2))
    false = "c" * 64
    for name, content in ((good, 1), (other, 2), (false, 3)):
        (tmp_path / f"{name}.npy").write_bytes(bytes([content]) * SIZE)
    (tmp_path / "lock").touch()
    (tmp_path / "mine.npy").write_bytes(b"mine")

    def refuse(part: FileIO) -> None:
        raise CorpusError("must be fetched")

    cache = ShardCache(tmp_path, SIZE)
    path = cache.get(good, SIZE, refuse)
    assert path == tmp_path / OWN / f"{good}.npy"
    assert path.read_bytes() == b"\1" * SIZE
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path} holds 3 shards of an older cache.")
    assert said.count("\n") == 1
    with pytest.raises(CorpusError, match="must be fetched"):
        ShardCache(tmp_path, SIZE).get(false, SIZE, refuse)
    assert {path.name for path in tmp_path.iterdir()} == {OWN, "lock", "mine.npy", f"{other}.npy", f"{false}.npy"}
    assert not capsys.readouterr().err, "once"


def test_many_processes_begin_one_cache_together(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from datamodules.shard_cache import ShardCache; sys.stdin.readline()\n"
    )
    code += "for n in range(50): ShardCache(Path(sys.argv[1]) / str(n), 1).hold('')"
    readers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE) for _ in range(3)
    ]
    for reader in readers:
        assert reader.stdin is not None
        reader.stdin.write(b"\n")
        reader.stdin.flush()
    for reader in readers:
        reader.communicate(timeout=120)
    assert [reader.returncode for reader in readers] == [0, 0, 0]
    assert {path.name for path in tmp_path.rglob("*") if path.is_dir()} == {OWN, *map(str, range(50))}
