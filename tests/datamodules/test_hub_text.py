"""data=hf: the beginning of a dataset that the datasets library reads, here from a folder."""

import json
import random
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.errors import ConfigError
from datamodules.hub_text import HubText
from datamodules.preparation import once
from datamodules.preparation.documents import find_inputs
from tests.support.runs import run_on, train
from tests.support.servers import http_server

WORDS = [
    "the",
    "norm",
    "of",
    "a",
    "span",
    "block",
    "stream",
    "depth",
    "init",
    "loss",
    "rate",
    "model",
    "token",
    "width",
]


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """More than a megabyte in the folder `hub`, beside which the data lie."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    made = [" ".join(draw.choices(WORDS, k=draw.randint(50, 150))) for _ in range(2500)]
    write(made)
    return made


def write(texts: list[str]) -> None:
    Path("hub").mkdir(exist_ok=True)
    Path("hub/train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def make(**settings: object) -> HubText:
    return HubText(**{"name": "hub", "root": "data", "seq_len": 16, "batch_size": 2, "tokenizer": "byte", **settings})


def texts_of(data: HubText) -> list[str]:
    found = []
    for split in ("train", "val"):
        tokens = data.split(split).tokens
        ends = np.flatnonzero(tokens == 256)
        found += [bytes(part[part < 256].tolist()).decode() for part in np.split(tokens, ends + 1)[:-1]]
    return found


def test_the_first_texts_are_read_as_far_as_is_said(texts: list[str]) -> None:
    sizes = np.cumsum([len(text) for text in texts])
    for most, count in ((1, int(np.searchsorted(sizes, 10**6)) + 1), (None, len(texts))):
        data = make(max_text_mb=most)
        assert data.vocab_size == 257, "before there is a corpus"
        data.prepare_data()
        data.check()
        assert sorted(texts_of(data)) == sorted(texts[:count])


def test_it_is_prepared_once_for_the_same_settings(texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    first = make(tokenizer="bpe:300", max_text_mb=1)
    assert first.vocab_size == 300
    first.prepare_data()
    assert capsys.readouterr().out == f"Preparing {first.folder}: the first 1 MB of hub, once\n"
    again = make(tokenizer="bpe:300", max_text_mb=1)
    again.prepare_data()
    assert capsys.readouterr().out == ""
    assert again.index.digest == first.index.digest
    others = (make(tokenizer="bpe:300"), make(max_text_mb=1), make(tokenizer="bpe:301", max_text_mb=1))
    assert len({data.folder for data in (first, *others)}) == 4


def test_files_that_have_changed_are_no_longer_what_the_corpus_was_made_of(
    texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are gone the corpus serves, as does that of a dataset on the hub."""
    make().prepare_data()
    made = make().index.digest
    write(["x" * 100, *texts])
    with pytest.raises(ConfigError, match=r"^data\.root='data/hub-byte-.*from other inputs"):
        make().prepare_data()
    Path("hub").rename("elsewhere")
    monkeypatch.setattr(once, "prepare", None)
    again = make()
    again.prepare_data()
    assert again.index.digest == made


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": ""}, "data.name=''"),
        ({"name": "one,two"}, "data.name='one,two'"),
        ({"root": ""}, "data.root=''"),
        ({"max_text_mb": 0}, "data.max_text_mb=0"),
        ({"tokenizer": "bpe:12"}, "data.tokenizer='bpe:12'"),
        ({"tokenizer": "nowhere.json"}, "data.tokenizer='nowhere.json'"),
        ({"text_field": "body"}, "data.text_field='body'.*row 1 of hub has text$"),
        ({"tokenizer": "bpe:90000"}, "data.tokenizer='bpe:90000'.*no more pairs"),
    ],
    ids=str,
)
def test_a_mistake_is_named_by_its_field(settings: dict[str, object], said: str, texts: list[str]) -> None:
    with pytest.raises(ConfigError, match=said):
        make(**settings).prepare_data()


def test_too_little_text_to_hold_some_out_is_said(texts: list[str]) -> None:
    write(["only one"])
    with pytest.raises(ConfigError, match=r"data\.name='hub'"):
        make().prepare_data()
    assert not list(Path("data").glob("[!.]*"))


def test_a_run_prepares_it_and_its_checkpoint_names_it(texts: list[str], tmp_path: Path) -> None:
    chosen = ["data=hf", "data.name=hub", "data.tokenizer=bpe:300", "data.max_text_mb=1"]
    folder = run_on(tmp_path, *chosen)
    assert (folder / "summary.json").is_file()
    (corpus,) = (tmp_path / "data").glob("hub-bpe-300-*")
    assert (
        json.loads((folder / "summary.json").read_text())["provenance"]["corpus"]
        == make(tokenizer="bpe:300", max_text_mb=1).index.digest
    )
    write(texts[1:])
    refused = train(tmp_path, *chosen, "run_dir=run", "ckpt_path=last", "trainer.max_steps=9")
    assert refused.code == 2
    assert corpus.is_dir()


CARDS = {
    "an address": ("README.md", "configs: [{config_name: default, data_files: 'ADDRESS/spy.jsonl'}]", "an address"),
    "of a split": (
        "README.md",
        "configs: [{config_name: x, data_files: [{split: train, path: ['*.jsonl', 'zip://*::ADDRESS/x.zip']}]}]",
        "an address",
    ),
    "a folder above": ("README.md", "configs: [{config_name: x, data_files: 'a/../../*.jsonl'}]", "leads out"),
    "a folder elsewhere": ("README.md", "configs: [{config_name: x, data_dir: /etc}]", "leads out"),
    "a plain file": (".huggingface.yaml", "configs: [{config_name: x, data_files: 'ADDRESS/x'}]", "an address"),
    "an alias": ("README.md", "x: &a {data_files: b}\ny: *a", "holds the alias"),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_folder_that_sends_elsewhere_is_refused_and_nothing_is_fetched(texts: list[str], name: str) -> None:
    file, settings, reason = CARDS[name]
    Path("served").mkdir()
    write(texts)
    with http_server(Path("served")) as server:
        settings = settings.replace("ADDRESS", server.address)
        Path("hub", file).write_text(settings if file != "README.md" else f"---\n{settings}\n---\n# Texts\n")
        with pytest.raises(ConfigError, match=rf"hf:hub.*hub/{re.escape(file)} .*{reason}"):
            next(find_inputs(["hf:hub"]).pieces())
        assert not server.asked


@pytest.mark.parametrize("settings", ["configs: [{config_name: default, data_files: '*.jsonl'}]", "license: mit", None])
def test_a_card_that_names_files_of_its_folder_is_read(texts: list[str], settings: str | None) -> None:
    write(texts[:3])
    Path("hub/README.md").write_text("# Texts\n---\n" if settings is None else f"---\n{settings}\n---\n# Texts\n")
    assert [piece.text.decode() for piece in find_inputs(["hf:hub"]).pieces()] == texts[:3]


def test_pictures_beside_the_text_are_not_opened(texts: list[str]) -> None:
    Path("served").mkdir()
    with http_server(Path("served")) as server:
        kind = datasets.Features({"text": datasets.Value("string"), "picture": datasets.Image()})
        table = pa.table(
            {"text": ["a"], "picture": pa.array([{"bytes": None, "path": f"{server.address}/x.png"}])},
            schema=kind.arrow_schema,
        )
        Path("hub").mkdir(exist_ok=True)
        for path in Path("hub").iterdir():
            path.unlink()
        pq.write_table(table, "hub/x.parquet")
        assert [piece.text for piece in find_inputs(["hf:hub"]).pieces()] == [b"a"]
        assert not server.asked
