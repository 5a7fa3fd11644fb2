"""A name is looked up in a registry, or leads to a class of the user's own by its import path."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spannorm import Depth, InvalidArgument, NormFactory, PreNorm, find_init, find_norm, find_placement, scale_init

OWN = """
from torch import nn
from spannorm import PreNorm

class MyNorm(PreNorm):
    pass

def my_scale(dim):
    return nn.Identity()

def no_module(dim):
    return dim

number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the user's, and one that cannot be imported."""
    (tmp_path / "own_norms.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("import this_module_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_norms", None)


def test_a_name_of_ours_is_found() -> None:
    assert find_placement("prenorm") is PreNorm
    assert find_init("scale_init") is scale_init
    assert isinstance(find_norm("layernorm")(8, 1e-5), nn.LayerNorm)


@pytest.mark.usefixtures("own")
def test_a_class_or_function_of_ones_own_is_found_by_its_import_path() -> None:
    assert issubclass(find_placement("own_norms.MyNorm"), PreNorm)
    assert isinstance(NormFactory("own_norms.my_scale", 8)(), nn.Identity)
    assert NormFactory("torch.nn.RMSNorm", 8, eps=0.5)().eps == 0.5, "eps goes to whatever takes it"


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("find", "name", "message"),
    [
        (
            find_placement,
            "prenrom",
            r"placement='prenrom' .* one of attnres, b2t, .* \(did you mean prenorm\?\), or an import",
        ),
        (find_norm, "own_norms", "one of derf, dyt, gatednorm, layernorm, none, rmsnorm, or an import path"),
        (find_placement, "own_norms.Missing", r"can be imported \(AttributeError: .*no attribute 'Missing'\)"),
        (find_placement, "own_broken.MyNorm", r"\(ModuleNotFoundError: No module named 'this_module_is_missing'\)"),
        (find_placement, "nowhere.MyNorm", r"\(ModuleNotFoundError: No module named 'nowhere'\)"),
        (find_placement, "torch.nn.Linear", r"placement='torch.nn.Linear' .* a subclass of spannorm.Placement"),
        (find_placement, "own_norms.my_scale", "a subclass of spannorm.Placement"),
        (find_init, "own_norms.number", "a class or function, not a int"),
        (find_init, "own norms.f", "one of b2t"),
        (find_init, ".os.system", "one of b2t"),
        (find_init, "", "one of b2t"),
        (lambda name: NormFactory(name, 8)(), "own_norms.no_module", "what makes a torch.nn.Module, not a int"),
    ],
)
def test_what_leads_nowhere_is_refused_in_a_line(find: Callable[[str], Any], name: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as error:
        find(name)
    assert "\n" not in str(error.value)


def test_a_norm_of_ones_own_goes_with_any_placement() -> None:
    """DeepNorm refuses kinds of ours that would not keep its stream in size; one's own is one's own to judge."""
    placement = find_placement("deepnorm")
    with pytest.raises(InvalidArgument, match=r"norm='none' is not valid: .* under DeepNorm"):
        placement(Depth(1, 2), NormFactory("none", 8))
    block = placement(Depth(1, 2), NormFactory("torch.nn.LayerNorm", 8))
    x = torch.randn(2, 3, 8)
    assert block(x, lambda x: x, lambda x: x).shape == x.shape
