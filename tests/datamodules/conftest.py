"""A corpus of a few kilobytes, prepared once."""

from pathlib import Path

import pytest

from datamodules.writer import write_corpus
from tests.support.runs import DESCRIPTION, SHARD, TinyData, documents


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where TinyData finds its corpus."""
    root = tmp_path_factory.mktemp("data")
    TinyData(root).prepare_data()
    return root


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny corpus in shards of 4096 tokens, a page each; to be read only."""
    folder = tmp_path_factory.mktemp("sharded") / "tiny"
    write_corpus(folder, documents(), 256, DESCRIPTION, SHARD)
    return folder
