"""The library in one file is the library."""

import ast
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import spannorm
from spannorm import PLACEMENTS
from tools.exporting.library_file import is_module, join, public_names

ALL = sorted(
    f"spannorm.{'.'.join(path.relative_to(Path(spannorm.__file__).parent).with_suffix('').parts)}"
    for path in Path(spannorm.__file__).parent.rglob("*.py")
    if path.name != "__init__.py"
)


def definitions(source: str) -> list[str]:
    """The names that a source binds at its top level, imports apart."""
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """All of the library as one module."""
    path = tmp_path_factory.mktemp("joined") / "joined_library.py"
    path.write_text(join(ALL))
    spec = importlib.util.spec_from_file_location("joined_library", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["joined_library"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["joined_library"]


def test_it_has_every_public_name_and_imports_the_library_nowhere(whole: ModuleType) -> None:
    for name in spannorm.__all__:
        ours, theirs = getattr(spannorm, name), getattr(whole, name)
        if inspect.isclass(ours) or inspect.isfunction(ours):
            assert inspect.getsource(theirs) == inspect.getsource(ours), name
            assert theirs.__module__ == "joined_library"
    assert whole.PLACEMENTS.keys() == PLACEMENTS.keys()
    imports = [node for node in ast.walk(ast.parse(join(ALL))) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [node for node in imports if "spannorm" in ast.unparse(node)]


def test_no_name_is_defined_by_two_files() -> None:
    """The later one would replace the earlier in one file."""
    names = definitions(join(ALL))
    assert len(names) == len(set(names)) > 60


def test_a_block_of_it_computes_the_same(whole: ModuleType) -> None:
    found = []
    for library in (spannorm, whole):
        block = library.SpanNorm(library.Depth(1, 2), library.NormFactory("rmsnorm", 8))
        torch.manual_seed(0)
        found.append(block(torch.randn(2, 3, 8), lambda x: 2 * x, lambda x: x * x))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_of_a_placement_it_has_no_other_than_what_that_one_builds_on(name: str) -> None:
    scheme = PLACEMENTS[name]
    source = join([scheme.__module__])
    bases = {base.__name__ for base in scheme.__mro__ if base.__module__.startswith("spannorm.")}
    built_on = bases | ({"PreNorm", "PostNorm"} if name == "mixln" else set())
    known = {each.__name__ for each in PLACEMENTS.values()}
    assert known & set(definitions(source)) == built_on & known


def test_what_is_a_module_of_it() -> None:
    assert is_module("spannorm.norms")
    assert is_module("spannorm.placements.prenorm")
    assert not is_module("spannorm.placements")
    assert not is_module("spannorm.nothing")
    assert not is_module("torch.nn")
    assert public_names()["SpanNorm"] == "spannorm.placements.spannorm"
    assert set(public_names()) == set(spannorm.__all__)
