"""A corpus of a few kilobytes, prepared once."""

from pathlib import Path

import pytest

from tests.helpers_run import TinyData


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where TinyData finds its corpus."""
    root = tmp_path_factory.mktemp("data")
    TinyData(root).prepare_data()
    return root
