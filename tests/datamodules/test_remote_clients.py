"""What reads s3://, gs://, hf:// and https://: none waits forever, and which package is missing is said."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fsspec.config import conf
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from core.errors import InvalidValue
from datamodules import remote
from datamodules.index import CorpusError
from datamodules.remote import RemoteFolder
from datamodules.shard_cache import ShardCache
from datamodules.shards import open_split
from datamodules.storage import read_index
from tests.support.servers import BUCKET, REPOSITORY, Hanging, HubHandler, hanging_server, http_server


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS", (0.001,) * 5)
    monkeypatch.setattr(remote, "CHUNK", 3000)


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    with hanging_server() as server:
        yield server


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("protocol", "reason"), [("http", "Timeout on reading data"), ("s3", "Read timeout on endpoint")]
)
def test_a_server_that_hangs_is_left_and_asked_six_times(
    hanging: Hanging, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str, reason: str
) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 0.2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", hanging.address)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    address = hanging.address if protocol == "http" else f"s3://{BUCKET}/x"
    with pytest.raises(CorpusError, match=rf"{address}/index.json cannot be read: .*{reason}.* \(6 attempts\)"):
        read_index(RemoteFolder(address, ShardCache(tmp_path, 10**9)))
    assert len(hanging.connections) == 6, "no client tries again by itself"


@pytest.mark.parametrize(
    ("address", "options", "own"),
    [
        ("https://x/y", "client_kwargs", {"headers": {"Authorization": "Bearer x"}}),
        ("s3://x/y", "config_kwargs", {"read_timeout": 300.0}),
    ],
)
def test_the_users_own_options_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, options: str, own: dict[str, object]
) -> None:
    monkeypatch.setitem(conf, address.partition(":")[0], {options: own})
    system, _ = RemoteFolder(address, ShardCache(tmp_path, 10**9))._file_system()
    given = getattr(system, options)
    assert own.items() <= given.items()
    assert given.keys() - own.keys(), "and ours, where there are none of theirs"


def test_what_comes_from_hugging_face_is_what_lies_here(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own client, against a server that knows what is asked of it."""
    with http_server(corpus, HubHandler) as server:
        monkeypatch.setitem(conf, "hf", {"endpoint": server.address, "skip_instance_cache": True})
        address, cache = f"hf://{REPOSITORY}/{corpus.name}", ShardCache(tmp_path, 10**9)
        split = open_split(RemoteFolder(address, cache), "train")
        np.testing.assert_array_equal(split.tokens, open_split(corpus, "train").tokens)
        assert server.fetched.keys() >= {path.name for path in corpus.glob("train-*.npy")}
        with pytest.raises(CorpusError, match=rf"{address}-not/index.json cannot be read: \w+: [^(]*$"):
            read_index(RemoteFolder(f"{address}-not", cache))


def test_what_comes_from_google_goes_through_the_client_that_is_registered(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the place of gcsfs, which is not among the tests' packages: memory that takes the same options."""

    class InMemory(MemoryFileSystem):
        protocol = "gs"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.removeprefix("gs:/"))

    monkeypatch.setitem(_registry, "gs", InMemory)
    system = InMemory()
    for path in corpus.iterdir():
        system.pipe_file(f"/bucket/tiny/{path.name}", path.read_bytes())
    storage = RemoteFolder("gs://bucket/tiny", ShardCache(tmp_path, 10**9))
    np.testing.assert_array_equal(open_split(storage, "train").tokens, open_split(corpus, "train").tokens)
    assert storage._file_system()[0].storage_options["session_kwargs"]["timeout"].sock_read == remote.TIMEOUT


@pytest.mark.parametrize(
    ("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("hf", "huggingface_hub"), ("https", "aiohttp")]
)
def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str, package: str
) -> None:
    monkeypatch.delitem(_registry, protocol, raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # its import fails
    with pytest.raises(InvalidValue) as error:
        RemoteFolder(f"{protocol}://a/b/c", ShardCache(tmp_path, 10**9))
    assert (error.value.field, error.value.value) == ("data.path", f"{protocol}://a/b/c")
    assert error.value.valid == f"{package} is not installed: pip install {package}"
