"""A finished run that a file's tests share, of the overrides in its `JOB`, and a copy of it for each of them."""

import shutil
from pathlib import Path

import pytest

from tests.support.runs import run


@pytest.fixture(scope="module")
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the file's run in `run`, which no test may change."""
    cwd = tmp_path_factory.mktemp("finished")
    run(cwd, "run", *request.module.JOB)
    return cwd


@pytest.fixture
def cwd(finished: Path, tmp_path: Path) -> Path:
    """A folder of the test's own with a copy of the run."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))
