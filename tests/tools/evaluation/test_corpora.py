"""Losses on corpora: what a run's saved configuration asks for is held against what there is."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from core.errors import ConfigError
from datamodules.preparation.prepare import PrepareConfig, prepare
from datamodules.shard_corpus import ShardCorpus
from tests.support.tool_runs import bpe_corpus
from tools.evaluation import corpora


def test_a_batch_that_no_memory_holds_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration from elsewhere may have any size of batch; Linux would kill the process for it."""
    module = SimpleNamespace(model_config=SimpleNamespace(dim=8))
    data = SimpleNamespace(batch_size=1 << 20, num_val_samples=100, seq_len=32, source_names=())
    monkeypatch.setattr(corpora, "memory_of_machine", lambda: 4 * 100 * 32 * 8 - 1)
    with pytest.raises(ConfigError, match=r"data.batch_size=1048576 .* takes 102,400 bytes, and .* 102,399"):
        corpora.measure(module, data, "val", 1)
    monkeypatch.setattr(corpora, "memory_of_machine", lambda: 4 * 100 * 32 * 8)
    with pytest.raises(AttributeError, match="samples"):  # of data, which it goes on to
        corpora.measure(module, data, "val", 1)


def test_a_corpus_whose_documents_end_otherwise_is_refused(tmp_path: Path) -> None:
    """Of the run's tokenizer, but closed by a token that the model has never read as an end."""
    own = bpe_corpus(tmp_path / "own")
    given = {"tokenizer": str(own / "tokenizer.json"), "end_of_document": "\u0100", "validation": 0.3, "processes": 1}
    prepare(PrepareConfig(str(tmp_path / "own/texts"), str(tmp_path / "other"), **given))
    tokenizer = ShardCorpus(str(own), 8, 2).tokenizer
    data = OmegaConf.create({"seq_len": 8, "batch_size": 2})
    run: Any = SimpleNamespace(config=SimpleNamespace(data=data), datamodule=SimpleNamespace(tokenizer=tokenizer))
    assert corpora.open_corpus(run, str(own)).tokenizer.end_of_document == tokenizer.end_of_document
    with pytest.raises(ConfigError, match=rf"whose documents token {tokenizer.end_of_document} closes, as in the run"):
        corpora.open_corpus(run, str(tmp_path / "other"))
