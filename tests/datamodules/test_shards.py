"""Reading a corpus: the right windows over any shards, and nothing from a file that cannot be trusted."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datamodules.index import CorpusError, parse_index
from datamodules.shards import Split, open_split
from datamodules.writer import write_corpus
from tests.support.runs import DESCRIPTION, SHARD, TEXT, documents

TRAIN = [token for split, text, _ in documents() if split == "train" for token in [*text, 256]]


@pytest.fixture
def folder(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the corpus, to be damaged."""
    return shutil.copytree(corpus, tmp_path / "corpus")


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(seq_len=st.integers(1, 3 * SHARD), data=st.data())
def test_windows_overlap_by_one_token_and_do_not_end_with_a_shard(corpus: Path, seq_len: int, data: Any) -> None:
    split = open_split(corpus, "train")
    assert split.num_samples(seq_len) == (len(TRAIN) - 1) // seq_len
    samples = data.draw(st.lists(st.integers(0, split.num_samples(seq_len) - 1), min_size=1, max_size=4))
    windows = split.read(np.array(samples), seq_len)
    assert windows.dtype == np.int64
    assert windows.tolist() == [TRAIN[n * seq_len : (n + 1) * seq_len + 1] for n in samples]


def test_a_stretch_of_the_stream_ends_where_the_stream_does(corpus: Path) -> None:
    split = open_split(corpus, "train")
    assert split.tokens.tolist() == TRAIN
    assert split.slice(SHARD - 1, SHARD + 2).tolist() == TRAIN[SHARD - 1 : SHARD + 2]
    assert split.slice(len(TRAIN) - 2, len(TRAIN) + 9).tolist() == TRAIN[-2:]
    assert split.num_samples(len(TRAIN)) == 0


def test_tokens_are_not_pickled(corpus: Path) -> None:
    split = open_split(corpus, "train")
    first = split.slice(0, 5).tolist()
    pickled = pickle.dumps(split)
    assert len(pickled) < 5000 < split.num_tokens
    assert pickle.loads(pickled).slice(0, 5).tolist() == first


def edit_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, **changes}))


def truncate(folder: Path) -> None:
    path = folder / "train-00003.npy"
    path.write_bytes(path.read_bytes()[:-2])


def remove(folder: Path) -> None:
    (folder / "train-00003.npy").unlink()


def remove_checksums(folder: Path) -> None:
    (folder / "train.checksums.npy").unlink()


def retype(folder: Path) -> None:
    """As long as before, but the header says that these are signed."""
    path = folder / "train-00003.npy"
    path.write_bytes(path.read_bytes().replace(b"<u2", b"<i2", 1))


def overwrite_header(folder: Path) -> None:
    path = folder / "train-00003.npy"
    path.write_bytes(bytes(128) + path.read_bytes()[128:])


def shorten_checksums(folder: Path) -> None:
    """As many bytes as before, of which the header says that they are fewer numbers."""
    path = folder / "train.checksums.npy"
    path.write_bytes(re.sub(rb"\(\d\d,\)", b"(11,)", path.read_bytes(), count=1))


def widen(folder: Path) -> None:
    edit_index(folder, dtype="uint32")


def misname(folder: Path) -> None:
    edit_index(folder, dtype="float16")


def make_newer(folder: Path) -> None:
    edit_index(folder, version=3)


def make_older(folder: Path) -> None:
    (folder / "index.json").write_text('{"version": 1, "dtype": "uint16", "splits": {"train": {"file": "train.bin"}}}')


def lose_a_shard(folder: Path) -> None:
    splits = json.loads((folder / "index.json").read_text())["splits"]
    del splits["train"]["shards"][1]
    edit_index(folder, splits=splits)


def lose_a_split(folder: Path) -> None:
    edit_index(folder, splits={})


def garble(folder: Path) -> None:
    (folder / "index.json").write_text("{")


def empty(folder: Path) -> None:
    (folder / "index.json").unlink()


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (truncate, "train-00003.npy", r"has 8318 bytes, its index says 8320; delete .* prepare the corpus again"),
        (remove, "train-00003.npy", "is missing, its index says 8320"),
        (remove_checksums, "train.checksums.npy", "is missing"),
        (retype, "train-00003.npy", r"holds int16 of shape \(4096,\), its index says uint16"),
        (overwrite_header, "train-00003.npy", "cannot be read"),
        (shorten_checksums, "train.checksums.npy", r"holds uint32 of shape \(11,\), its index says uint32 of shape"),
        (widen, "train-00000.npy", "has 8320 bytes, its index says 16512"),
        (misname, "index.json", "dtype 'float16' is none of uint16, uint32"),
        (make_newer, "index.json", "has version 3; this code reads version 2: use a newer checkout"),
        (make_older, "index.json", "has version 1; this code reads version 2: delete its folder and prepare"),
        (lose_a_shard, "index.json", r"the shards of train do not add up to its \d+ tokens"),
        (lose_a_split, "index.json", "is not a whole index: there is no split 'train'"),
        (garble, "index.json", "cannot be read"),
        (empty, "index.json", "cannot be read: No such file"),
    ],
)
def test_what_index_sizes_and_headers_show_is_found_at_start(
    folder: Path, damage: Callable[[Path], None], file: str, reason: str
) -> None:
    damage(folder)
    with pytest.raises(CorpusError, match=reason) as error:
        open_split(folder, "train")
    assert str(folder / file) in str(error.value)


def flip_a_bit(folder: Path, shard: int = 3) -> None:
    path = folder / f"train-{shard:05d}.npy"
    content = bytearray(path.read_bytes())
    content[128 + 2000] ^= 1
    path.write_bytes(content)


def flip_a_checksum(folder: Path) -> None:
    path = folder / "train.checksums.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_bit, r"train-00003\.npy, tokens 0 to 4095: damaged, the checksum is not the index's; delete"),
        (flip_a_checksum, r"train\.checksums\.npy is damaged"),
    ],
)
def test_what_only_the_content_shows_is_found_at_the_first_read(
    folder: Path, damage: Callable[[Path], None], reason: str
) -> None:
    damage(folder)
    split = open_split(folder, "train")
    for _ in range(2):  # not forgotten after it was said once
        with pytest.raises(CorpusError, match=reason):
            split.read(np.array([0, 3 * SHARD // 100]), seq_len=100)


def test_a_page_that_was_verified_is_not_verified_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verified: list[int] = []
    verify = Split._verify
    monkeypatch.setattr(Split, "_verify", lambda self, page, *rest: (verified.append(page), verify(self, page, *rest)))
    split = open_split(folder, "train")
    for _ in range(3):
        split.slice(10, SHARD + 10)
        split.slice(0, SHARD)
    assert verified == [0, 1]


def test_a_token_beyond_the_vocabulary_is_named(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", documents(), 256, DESCRIPTION)
    edit_index(tmp_path / "corpus", vocab_size=max(TEXT), end_of_document=0)
    split = open_split(tmp_path / "corpus", "train")
    with pytest.raises(CorpusError, match=rf"train-00000\.npy, .*: token 256 is beyond the vocabulary of {max(TEXT)}"):
        split.slice(0, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sha256", "../../elsewhere"),
        ("sha256", None),
        ("sha256", "A" * 64),
        ("length", -1),
        ("length", "7"),
        ("length", True),
    ],
)
def test_a_file_of_an_index_is_what_its_fields_may_be(tmp_path: Path, field: str, value: object) -> None:
    """A cache calls its files by their sha256, so that it must not be a path."""
    folder = tmp_path / "corpus"
    write_corpus(folder, documents(), 256, DESCRIPTION)
    content = json.loads((folder / "index.json").read_text())
    content["splits"]["val"]["shards"][0][field] = value
    with pytest.raises(CorpusError, match=f"{field}={re.escape(repr(value)[:60])}"):
        parse_index(json.dumps(content), "index.json")
