"""Corpora and texts from elsewhere: an index stays in its folder, and a reader comes to an end."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import ConfigError, InvalidValue
from datamodules.index import CorpusError
from datamodules.preparation.bounds import Bounds
from datamodules.preparation.documents import find_inputs
from datamodules.preparation.inspect import verify
from datamodules.preparation.prepare import PrepareConfig, prepare
from datamodules.shards import open_split
from datamodules.storage import LocalFolder, read_index
from datamodules.writer import write_corpus
from tests.support.runs import DESCRIPTION
from tests.support.runs import documents as tiny_documents


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus", tiny_documents(), 256, DESCRIPTION)
    return tmp_path / "corpus"


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret", "sub/../../secret", "..", ".", "", "a\\b", "a\0b"])
@pytest.mark.parametrize("field", ["shards", "checksums", "documents", "tokenizer_file"])
def test_an_index_names_files_of_its_own_folder_only(corpus: Path, field: str, name: str) -> None:
    index = json.loads((corpus / "index.json").read_text())
    split = index["splits"]["train"]
    if field == "tokenizer_file":
        index[field] = name
    else:
        (split[field][0] if field == "shards" else split[field])["file"] = name
    (corpus / "index.json").write_text(json.dumps(index))
    with pytest.raises(
        CorpusError, match="is not the name of a file in its folder" if name else "should have at least 1 character"
    ):
        open_split(corpus, "train")


@pytest.mark.parametrize("name", ["train-00000.npy", "index.json"])
def test_a_link_that_leads_out_of_the_folder_is_not_followed(corpus: Path, name: str) -> None:
    outside = (corpus / name).rename(corpus.parent / "outside")
    (corpus / name).symlink_to(outside)
    with pytest.raises(CorpusError, match=f"{name} is a link that leads out of its folder"):
        open_split(corpus, "train")


def test_a_link_within_the_folder_is(corpus: Path) -> None:
    (corpus / "train-00000.npy").rename(corpus / "renamed")
    (corpus / "train-00000.npy").symlink_to("renamed")
    assert open_split(corpus, "train").slice(0, 3).tolist() == list(next(tiny_documents())[2][:3])


def test_links_in_circles_and_pipes_are_passed_by(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    (texts / "below").mkdir(parents=True)
    (texts / "below/a.txt").write_text("text")
    for name in ("one", "two", "three"):
        (texts / name).symlink_to(texts)
    (texts / "self").symlink_to("self")
    os.mkfifo(texts / "pipe")
    for pattern in (str(texts), f"{texts}/**", f"{texts}/**/*.txt", f"{tmp_path}/*/**/a.txt"):
        assert find_inputs([pattern], "text", None).names == (str(texts / "below/a.txt"),), pattern
    with pytest.raises(ConfigError, match="a file, a folder with files"):
        find_inputs([f"{texts}/pi*"], "text", None)
    named = str(texts / "pipe")
    assert find_inputs([named], "text", None).names == (named,), "tests/tools/test_prepare.py reads one to its end"


def test_any_name_and_any_bytes_become_tokens(tmp_path: Path) -> None:
    texts = tmp_path / "a folder"
    texts.mkdir()
    for number, name in enumerate(["a b.txt", "a\nb.txt", "ü.txt", "'\".txt", "-x.txt", *map(str, range(40))]):
        (texts / name).write_bytes(bytes([number + 1, 0xFF, 0xFE, 0xC3, 0x28]) * 20)
    config = PrepareConfig(str(texts), str(tmp_path / "out put\n"), processes=1, validation=0.3)
    index = prepare(config)
    assert sum(split.num_bytes for split in index.splits.values()) == 45 * 100
    storage = LocalFolder(Path(config.output))
    assert len(list(verify(storage, read_index(storage)))) == 6


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_corpus_is_refused_and_leaves_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "empty.jsonl").write_bytes(content)
    with pytest.raises(ConfigError):
        prepare(PrepareConfig(str(tmp_path / "empty.jsonl"), str(tmp_path / "out"), processes=1))
    assert [path.name for path in tmp_path.iterdir()] == ["empty.jsonl"]


def test_a_line_of_json_has_an_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "' + "a" * 1_000_000 + '"}\n')
    inputs = find_inputs([str(tmp_path / "a.jsonl")], bounds=Bounds(record_mb=1))
    bound = "a line of JSON is longer than 1,000,000 bytes; max_record_mb=2 allows more"
    with pytest.raises(InvalidValue, match=rf"a\.jsonl, line 1' is not valid: {bound}"):
        list(inputs.pieces())
    assert len(list(replace(inputs, bounds=Bounds(record_mb=2)).pieces())) == 1
