"""The server process that all of this folder's tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fuzz import seeds
from tests.support.fuzz.sandbox import Sandbox


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    sandbox = Sandbox()
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="session")
def seeds_folder(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good folder of every kind that is read."""
    return seeds.make(sandbox, tmp_path_factory.mktemp("seeds") / "all")
