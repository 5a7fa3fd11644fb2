"""The tokenizer of a folder of transformers: its own file, and the end of a text that its other files name."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import ConfigError
from datamodules.index import Index
from datamodules.preparation.bpe import find_tokenizer, make_tokenizer, train_bpe
from datamodules.preparation.prepare import PrepareConfig, prepare
from datamodules.shard_corpus import ShardCorpus
from datamodules.tokenizer_folder import check_tokenizer
from datamodules.tokenizers import ByteTokenizer, FileTokenizer, NumberTokenizer
from tests.support.runs import TEXT

CONTENT = train_bpe([TEXT], 300)
VOCABULARY = json.loads(CONTENT)["model"]["vocab"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/tokenizer.json").write_bytes(CONTENT)
    return tmp_path / "model"


def end_of(folder: Path, end_of_document: str | None = None) -> int:
    content = find_tokenizer(str(folder))
    assert content == CONTENT
    return make_tokenizer(content, str(folder), end_of_document).end_of_document


def test_a_usual_one_where_no_file_names_it(folder: Path) -> None:
    assert end_of(folder) == VOCABULARY["<|endoftext|>"]


@pytest.mark.parametrize("name", ["t", {"content": "t", "lstrip": False}], ids=str)
def test_the_name_in_tokenizer_config_comes_first(name: Any, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"eos_token_id": VOCABULARY["e"]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": name}))
    assert end_of(folder) == VOCABULARY["t"]
    assert end_of(folder, "a") == VOCABULARY["a"], "what the user says comes before that"


@pytest.mark.parametrize("number", [VOCABULARY["e"], [VOCABULARY["e"], VOCABULARY["t"]]], ids=str)
def test_then_the_number_in_config(number: Any, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"eos_token_id": number}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": None}))
    assert end_of(folder) == VOCABULARY["e"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", '{"eos_token": "<none>"}', "eos_token='<none>' of its tokenizer_config.json is no"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token='3' of its tokenizer_config.json is no token"),
        ("config.json", '{"eos_token_id": 1000000}', "eos_token_id=1000000 of its config.json is no token"),
        ("config.json", '{"eos_token_id": "2"}', "eos_token_id=2 of its config.json is no token"),
        ("config.json", '{"eos_token_id": -1}', "eos_token_id=-1 of its config.json is no token"),
        ("config.json", "{", "config.json cannot be read"),
        ("tokenizer_config.json", "[" * 1000, "nested more than"),
    ],
)
def test_a_name_that_the_tokenizer_has_not_is_refused(file: str, content: str, message: str, folder: Path) -> None:
    (folder / file).write_text(content)
    with pytest.raises(ConfigError) as caught:
        end_of(folder)
    assert str(caught.value).startswith(f"tokenizer='{folder}' is not valid: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"or the path of a tokenizer\.json or of a folder with one"):
        find_tokenizer(str(tmp_path))


def test_a_corpus_is_prepared_with_it(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"eos_token": "t"}')
    (tmp_path / "texts").mkdir()
    for n in range(10):
        (tmp_path / f"texts/{n}.txt").write_bytes(TEXT[n * 900 : (n + 1) * 900].replace(b"t", b"d"))
    config = PrepareConfig(str(tmp_path / "texts"), str(tmp_path / "data"), str(folder), validation=0.3, processes=1)
    index: Index = prepare(config)
    assert index.end_of_document == VOCABULARY["t"]
    tokenizer = ShardCorpus(str(tmp_path / "data"), 16, 1).tokenizer
    assert isinstance(tokenizer, FileTokenizer)
    assert tokenizer.content == CONTENT
    check_tokenizer(str(folder), tokenizer)


def test_other_tokens_than_the_datas_are_refused(folder: Path) -> None:
    same = FileTokenizer(json.dumps(json.loads(CONTENT)).encode(), "written anew", VOCABULARY["<|endoftext|>"])
    assert same.content != CONTENT
    check_tokenizer(str(folder), same)
    check_tokenizer(str(folder.parent), ByteTokenizer())  # which says nothing of its tokens
    other = FileTokenizer(train_bpe([TEXT[:2000]], 300), "other", 0)
    assert other.vocab_size == same.vocab_size
    for tokenizer in (ByteTokenizer(), NumberTokenizer(300), other):
        with pytest.raises(ConfigError, match=rf"init_from='{folder}' .* for the data's tokens, {tokenizer.name}"):
            check_tokenizer(str(folder), tokenizer)
