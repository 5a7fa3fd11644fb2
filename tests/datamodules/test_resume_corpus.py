"""A run goes on with the corpus that its position counts in, or not at all."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from datamodules.mixture import Mixture
from datamodules.shards import open_split
from datamodules.storage import LocalFolder, read_index
from datamodules.synthetic import Synthetic
from datamodules.writer import write_corpus
from tests.support.runs import DESCRIPTION, documents, load, tiny_job, train


@pytest.fixture
def corpora(tmp_path: Path) -> list[str]:
    """The digests of two, as long as each other: in the folders `one` and `two`."""
    write_corpus(tmp_path / "one", documents(), 256, DESCRIPTION)
    write_corpus(
        tmp_path / "two", ((split, text, tokens[::-1]) for split, text, tokens in documents()), 256, DESCRIPTION
    )
    lengths = [open_split(tmp_path / name, "train").num_tokens for name in ("one", "two")]
    assert lengths[0] == lengths[1]
    return [read_index(LocalFolder(tmp_path / name)).digest for name in ("one", "two")]


def test_a_run_does_not_go_on_with_another_corpus(tmp_path: Path, corpora: list[str]) -> None:
    job = [argument for argument in tiny_job("data=shards") if not argument.startswith("data.root=")]
    assert train(tmp_path, *job, "data.path=one", "run_dir=run").code == 0
    go_on = [*job, "run_dir=run", "ckpt_path=last", "trainer.max_steps=3"]
    before = sorted((tmp_path / "run").rglob("*"))
    refused = train(tmp_path, *go_on, "data.path=two")
    assert refused.code == 2
    expected = rf"Error: data\.corpus='{corpora[1]}' is not valid: expected '{corpora[0]}', as in the checkpoint.*\n"
    assert re.fullmatch(expected, refused.err[refused.err.index("Error: ") :])
    assert sorted((tmp_path / "run").rglob("*")) == before
    shutil.move(tmp_path / "one", tmp_path / "moved")
    last = tmp_path / "run/checkpoints/last.ckpt"
    checkpoint = load(last)
    assert train(tmp_path, *go_on, "data.path=moved").code == 0, "it is the same one, wherever it lies"
    del checkpoint["ShardCorpus"]["stream_identity"]["corpus"]  # as before it was noted
    torch.save(checkpoint, last)
    assert train(tmp_path, *go_on, "data.path=two").code == 0


def test_a_mixture_and_a_task_say_what_they_are(tmp_path: Path, corpora: list[str]) -> None:
    mixture = Mixture([str(tmp_path / name) for name in ("two", "one")], [1, 1], 32, 4)
    assert mixture.stream_identity["corpus"] == corpora[::-1]
    assert Synthetic("copy", 8, 8, 2).stream_identity["task"] == "copy"
