"""The tests that the pages name are there."""

import re
from pathlib import Path

import pytest

from tests.support.runs import ROOT

PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md")])
FILES = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/*.py")}
NAMES = {path.rpartition("/")[2] for path in FILES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_is_a_file(page: Path) -> None:
    named = re.findall(r"`((?:tests/)?[\w/]*test_\w+\.py)", page.read_text())
    missing = [path for path in named if path not in (FILES if path.startswith("tests/") else NAMES)]
    assert not missing


def test_some_are_named() -> None:
    assert sum("test_" in page.read_text() for page in PAGES) > 3
