"""Objects from `_target_`, and whose fault it was when there is none."""

from fractions import Fraction
from typing import Any

import pytest
from omegaconf import OmegaConf

from core.build import build, build_all
from core.errors import ConfigError


class Thing:
    def __init__(self, size: int = 1, kind: str = "plain", parts: Any = None) -> None:
        if size < 0:
            raise ValueError(f"`size` must not be\n   negative, got {size}")
        if kind == "odd":
            raise RuntimeError("there is no odd one here")
        if kind == "worse":
            raise ImportError("a library is missing")
        self.size, self.kind, self.parts = size, kind, parts


def config(**node: Any) -> Any:
    return OmegaConf.create({"group": {"one": {"_target_": f"{__name__}.Thing", **node}, "none": None}, "base": 3})


def test_values_arrive_plain_resolved_and_instantiated() -> None:
    nested = {"_target_": "fractions.Fraction", "numerator": 1, "denominator": 3}
    thing = build(config(size="${base}", parts=[{"a": nested}]), "group.one", kind="given")
    assert (thing.size, thing.kind) == (3, "given")
    assert type(thing.parts) is list
    assert type(thing.parts[0]) is dict
    assert thing.parts[0]["a"] == Fraction(1, 3)


def test_null_leaves_an_entry_out_and_a_group_may_be_missing() -> None:
    assert [thing.size for thing in build_all(config(size=5), "group")] == [5]
    assert build_all(config(), "nothing") == []


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "no.such.Class"}, r"group\.one\._target_='no\.such\.Class' .*can be imported"),
        ({"_target_": "core.build.no_such"}, r"group\.one\._target_='core\.build\.no_such' .*can be imported"),
        ({"_target_": "core.errors"}, r"group\.one\._target_='core\.errors' .*can be imported"),
        ({"size": "a"}, r"group\.one\.size='a' is not valid: expected an integer$"),
        (
            {"sze": 1},
            r"group\.one\.sze=1 is not valid: no such field; one of kind, parts, size \(did you mean size\?\)$",
        ),
        ({"size": -1}, r"group\.one\.size=-1 is not valid: `size` must not be negative, got -1$"),
        ({"kind": "odd"}, r"group\.one\.kind='odd' is not valid: there is no odd one here$"),
        ({"kind": "worse"}, rf"group\.one\._target_='{__name__}\.Thing' is not valid: a library is missing$"),
    ],
)
def test_the_field_at_fault_is_named(node: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(config(**node), "group.one")


def test_a_group_without_target_is_named() -> None:
    with pytest.raises(ConfigError, match="base=3 is not valid: expected a group with a _target_"):
        build(config(), "base")


@pytest.mark.parametrize(
    ("node", "field", "value"),
    [
        ({"parts": {"_target_": "os.system"}}, "group.one.parts", "os.system"),
        ({"parts": {"_target_": "nothing.here"}}, "group.one.parts", "nothing.here"),
        ({"parts": {"a": {"_target_": "nothing.here"}}}, "group.one.parts.a", "nothing.here"),
        ({"parts": [{"_target_": "nothing.here"}]}, "group.one.parts[0]", "nothing.here"),
        ({"parts": {"a": [1, {"b": [{"_target_": "nothing.here"}]}]}}, "group.one.parts.a[1].b[0]", "nothing.here"),
        ({"parts": {"_target_": "fractions.Fraction", "numerator": "x"}}, "group.one.parts", "fractions.Fraction"),
    ],
)
def test_a_target_further_down_is_named_whole(node: dict[str, Any], field: str, value: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build(config(**node), "group.one")
    assert refused.value.field == field
    assert refused.value.value["_target_"] == value  # type: ignore[index]
    assert "HYDRA" not in str(refused.value) or value == "os.system"


def test_what_one_of_ours_says_further_down_stays() -> None:
    inner = {
        "_target_": "datamodules.synthetic.Synthetic",
        "task": "nothing",
        "vocab_size": 9,
        "seq_len": 8,
        "batch_size": 1,
    }
    with pytest.raises(ConfigError, match=r"task='nothing' is not valid"):
        build(config(parts=inner), "group.one")
