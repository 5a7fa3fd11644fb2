"""The corpus that every machine has: which files, in which split, and that nothing is lost on the way."""

import hashlib
import json
import os
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from core.errors import ConfigError
from datamodules.index import CorpusError
from datamodules.python_stdlib import PythonStdlib
from datamodules.shards import open_split
from datamodules.stdlib_documents import split_of
from datamodules.tokenizers import ByteTokenizer

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
APART = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PythonStdlib:
    data = PythonStdlib(str(tmp_path_factory.mktemp("data")), seq_len=256, batch_size=8)
    data.prepare_data()
    data.check()
    return data


def expected_documents() -> dict[str, bytes]:
    """{name: text}, gathered another way than the source does."""
    from pydoc_data.topics import topics

    found = {f"pydoc_data/topics/{topic}": text.encode() for topic, text in topics.items()}
    for folder, folders, files in os.walk(LIBRARY):
        folders[:] = [name for name in folders if name not in APART]
        for file in files:
            name = (Path(folder) / file).relative_to(LIBRARY).as_posix()
            if file.endswith(".py") and name != "pydoc_data/topics.py":
                found[name] = (LIBRARY / name).read_bytes()
    return found


def documents(data: PythonStdlib, split: str) -> list[bytes]:
    tokens = open_split(data.folder, split).tokens
    ends = np.flatnonzero(tokens == 256)
    assert ends[-1] == len(tokens) - 1, "every document is closed, the last one too"
    return [piece[piece != 256].astype(np.uint8).tobytes() for piece in np.split(tokens, ends)[:-1]]


def test_the_splits_are_the_library_and_the_reference_without_tests(data: PythonStdlib) -> None:
    texts = expected_documents()
    assert {"argparse.py", "json/decoder.py", "pydoc_data/topics/if"} <= texts.keys()
    assert not any("test" in name.split("/") for name in texts)
    for split in ("train", "val"):
        chosen = [text for name, text in texts.items() if (share(name) < 0.05) == (split == "val")]
        assert Counter(documents(data, split)) == Counter(chosen)


def share(name: str) -> float:
    """Where a name's hash falls in [0, 1)."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 16**16


def test_a_known_file_is_found_verbatim_in_the_decoded_text(data: PythonStdlib) -> None:
    text, tokens = (LIBRARY / "argparse.py").read_bytes(), open_split(data.folder, split_of(b"argparse.py")).tokens
    start = tokens.astype(np.uint16).tobytes().find(ByteTokenizer().encode(text).tobytes()) // 2
    assert start >= 0
    assert ByteTokenizer().decode(tokens[start : start + len(text) + 1].tolist()) == text.decode() + "\f"


def test_the_split_of_a_name_never_changes() -> None:
    names = [f"package/module_{n}.py" for n in range(4000)]
    share_of_validation = sum(split_of(name.encode()) == "val" for name in names) / len(names)
    assert 0.04 < share_of_validation < 0.06
    assert [n for n in range(60) if split_of(names[n].encode()) == "val"] == [2, 23, 43]


def test_the_index_describes_the_files(data: PythonStdlib) -> None:
    index = json.loads((data.folder / "index.json").read_text())
    assert data.folder.name.endswith("-byte")
    assert (index["vocab_size"], index["tokenizer"], index["dtype"]) == (257, "byte", "uint16")
    for name in ("train", "val"):
        entry, texts = index["splits"][name], documents(data, name)
        for file in (*entry["shards"], entry["documents"], entry["checksums"]):
            assert file["sha256"] == hashlib.sha256((data.folder / file["file"]).read_bytes()).hexdigest()
        assert entry["num_documents"] == len(texts)
        assert entry["num_bytes"] == sum(map(len, texts))
        assert entry["num_tokens"] == entry["num_bytes"] + len(texts)


def test_it_is_prepared_once(data: PythonStdlib) -> None:
    before = (data.folder / "index.json").stat()
    data.prepare_data()
    assert (data.folder / "index.json").stat() == before
    assert [path.name for path in data.root.iterdir()] == [data.folder.name]


def test_a_damaged_index_is_an_error_and_not_overwritten(tmp_path: Path) -> None:
    data = PythonStdlib(str(tmp_path), seq_len=8, batch_size=1)
    data.folder.mkdir()
    (data.folder / "index.json").write_text("[")
    with pytest.raises(CorpusError, match=r"index\.json cannot be read"):
        data.prepare_data()


def test_an_interpreter_without_sources_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "library").mkdir()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "library")})
    with pytest.raises(CorpusError, match=r"holds no Python sources; use another interpreter"):
        PythonStdlib(str(tmp_path / "data"), seq_len=8, batch_size=1).prepare_data()
    assert not (tmp_path / "data").exists()


def test_a_root_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"data\.root='.*/file' is not valid: expected a folder .*(File exists|Not a directory)"
    ):
        PythonStdlib(str(tmp_path / "file"), seq_len=8, batch_size=1).prepare_data()


def test_bytes_are_tokens() -> None:
    tokenizer, text = ByteTokenizer(), "naïve\n".encode()
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == list(text)
    assert tokenizer.decode([*tokens.tolist(), 256, 0xFF]) == "naïve\n\f\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("name", "value"), [("seq_len", 0), ("seq_len", -1), ("seq_len", 10**9), ("batch_size", 10**7)]
)
def test_a_length_that_cannot_be_is_refused_before_anything_is_written(tmp_path: Path, name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{name}={value} is not valid"):
        PythonStdlib(str(tmp_path / "data"), **{"seq_len": 256, "batch_size": 8, name: value}).prepare_data()
    assert not list(tmp_path.iterdir())
