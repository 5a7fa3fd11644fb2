"""Imports of every form, made relative in one flat folder, mean there what they meant before."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.errors import UserError
from tools.exporting.own_files import collect, comes_along

PACKAGE = {
    "own_pkg/__init__.py": "raise RuntimeError('a package file is not needed')",
    "own_pkg/norms.py": '''"""é: columns are counted in bytes, and a form feed\f ends no line."""
import math; from .deep.helpers import (  # a comment
    two,
    three as drei,
)
from . import consts
from .consts import ONE, sums as added
import own_single, torch
import spannorm, spannorm as sn
import spannorm.norms as norms
import own_single as single
from spannorm import *
from spannorm import SpanNorm as Spanned, Depth
from spannorm import norms as kinds
from spannorm.placements import base
from spannorm.placements.base import TwoStreams
import own_pkg.consts as constants

def total():
    from own_single import four
    assert single is own_single and constants is consts and torch.ones(1).item() == ONE
    assert base.Placement is kinds.Placement and issubclass(TwoStreams, base.Placement)
    return ONE + two() + drei() + four + added(5) + math.floor(6.5) + len(PreNorm.__name__) + of_the_library()

def of_the_library():
    return spannorm.Depth(1, 7).total + sn.Depth(1, 8).total + norms.NormFactory('none', 9).dim
''',
    "own_pkg/deep/__init__.py": "",
    "own_pkg/deep/helpers.py": "from ..consts import ONE\ndef two(): return 2 * ONE\ndef three(): return 3\n",
    "own_pkg/consts.py": "ONE = 1\ndef sums(n): return n\n",
    "own_single.py": "import json\nfour = 4\n",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, source in PACKAGE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    (tmp_path / "own_pkg/__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("own_pkg", "own_single", "flat_pkg")]:
        del sys.modules[name]


def test_every_form_of_import_means_the_same_in_the_flat_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = collect("own_pkg.norms")
    (home / "flat_pkg").mkdir()
    for name, source in flat.items():
        (home / f"flat_pkg/{name}.py").write_text(source)
    assert flat.keys() == {"own_pkg_norms", "own_pkg_deep_helpers", "own_pkg_consts", "own_single", "spannorm"}
    parts = set(re.findall(r"^# spannorm/placements/(\w+).py -", flat["spannorm"], re.MULTILINE))
    assert parts == {"base", "gpas", "prenorm", "spannorm"}, "of the library, what is used"
    (home / "own_pkg").rename(home / "gone")
    (home / "own_single.py").rename(home / "gone.py")
    for name in [name for name in sys.modules if name.startswith(("own_pkg", "own_single"))]:
        del sys.modules[name]
    importlib.invalidate_caches()
    module = importlib.import_module("flat_pkg.own_pkg_norms")
    assert module.total() == 1 + 2 + 3 + 4 + 5 + 6 + len("PreNorm") + 7 + 8 + 9
    assert module.Spanned.__module__ == "flat_pkg.spannorm"


@pytest.mark.parametrize(
    ("source", "written", "instead"),
    [
        ("\nimport own_pkg.consts\n", "line 2: `import own_pkg.consts`", "from own_pkg import consts"),
        ("import spannorm\nf = spannorm.norms.DyT", "line 1: `import spannorm`", "from spannorm import NAME"),
        ("import spannorm as s\nf = s", "line 1: `import spannorm as s`", "from spannorm import NAME"),
        ("from spannorm import placements", "line 1: `from spannorm import placements`", "from spannorm import NAME"),
        ("import spannorm.norms", "line 1: `import spannorm.norms`", "from spannorm import norms"),
    ],
)
def test_an_import_that_has_no_relative_form_is_refused(home: Path, source: str, written: str, instead: str) -> None:
    (home / "own_single.py").write_text(source)
    with pytest.raises(UserError) as error:
        collect("own_pkg.norms")
    assert str(error.value) == f"{home}/own_single.py, {written} cannot be exported; write `{instead}`"


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("module", "comes"),
    [
        ("own_single", True),
        ("own_pkg.deep.helpers", True),
        ("core.errors", True),
        ("spannorm.norms", True),
        ("torch", False),
        ("torch.nn", False),
        ("json", False),
        ("sys", False),
        ("own_pkg.nothing", False),
        ("megablocks.layers", False),
        ("nowhere.at.all", False),
        ("own_single.four", False),
    ],
)
def test_what_comes_along_is_the_projects_and_the_users(module: str, comes: bool) -> None:
    assert comes_along(module) == comes


def test_two_modules_of_one_flat_name_get_two_files(home: Path) -> None:
    (home / "own_pkg_consts.py").write_text("TEN = 10\n")
    (home / "own_single.py").write_text("from own_pkg_consts import TEN as four\n")
    flat = collect("own_pkg.norms")
    assert "TEN = 10" in flat["own_pkg_consts_"]
    assert "from .own_pkg_consts_ import TEN as four" in flat["own_single"]


def test_the_exports_own_names_are_not_taken(home: Path) -> None:
    entry = "tools.exporting.modeling_placement"
    (home / "modeling_placement.py").write_text("ONE = 1\n")
    try:
        flat = collect(entry, {entry: "from modeling_placement import ONE\n"})
    finally:
        (home / "modeling_placement.py").unlink()
    assert flat == {
        "modeling_placement": "from .modeling_placement_ import ONE\n",
        "modeling_placement_": "ONE = 1\n",
    }


@pytest.mark.parametrize(
    "lines", ["# -*- coding: latin-1 -*-\n", "#!/usr/bin/python\n# vim: set fileencoding=latin-1 :\n"]
)
def test_a_file_in_another_encoding_is_one_in_utf_8(lines: str, home: Path) -> None:
    (home / "own_single.py").write_bytes(f"{lines}four = 'é'\n".encode("latin-1"))
    source = collect("own_single")["own_single"]
    assert source == f"{lines.replace('latin-1', 'utf-8')}four = 'é'\n"
    names: dict[str, str] = {}
    exec(compile(source.encode("utf-8"), "own_single.py", "exec"), names)
    assert names["four"] == "é"


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("source", ["", "x = 1", "x = 1\n", "\n\nx = 1\n\n"])
def test_a_file_without_imports_is_left_as_it_is(source: str, home: Path) -> None:
    (home / "own_single.py").write_text(source)
    assert collect("own_single") == {"own_single": source}
