"""docs/map.md names files and definitions that are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/map.md").read_text()
ROWS = re.findall(r"^\| (\d) \| `([^`]+)`(?: `([^`]+)`)? \|", TEXT, re.MULTILINE)


def test_each_way_takes_six_files() -> None:
    assert [int(number) for number, *_ in ROWS] == [*range(1, 7)] * 3


@pytest.mark.parametrize(("file", "name"), [(file, name) for _, file, name in ROWS], ids=lambda part: part or "-")
def test_the_file_defines_what_the_map_says(file: str, name: str) -> None:
    text = (ROOT / file).read_text()
    if not name:
        return
    nodes = ast.walk(ast.parse(text))
    defined = {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert set(name.split(".")) <= defined


def test_every_other_path_is_there() -> None:
    paths = [path for path in re.findall(r"`([\w/.]+)`", TEXT) if "/" in path or path.endswith(".py")]
    assert len(paths) > 25
    for path in paths:
        assert path.endswith("...") or (ROOT / path).exists(), path
    assert "MAY_CHANGE" in (ROOT / "core/run_folder.py").read_text()
