"""Which override of a command line is at fault, and what one set a field to."""

from typing import Any

import pytest

from core.overrides import GRAMMAR, as_lists, choices, given, not_a_choice, parse

LOGGERS = "expected one of comet, csv, mlflow, tensorboard, wandb"


@pytest.mark.parametrize(
    "value", ["0", "null", "true", "1.5", "[0]", "[csv,null]", "[[csv]]", "", "''", "[{a: b}]", "csv,0"]
)
def test_what_is_no_name_is_found(value: str) -> None:
    wrong = not_a_choice(["model=dense", "--cfg", "job", f"logger={value}", "model.dim=8"])
    assert wrong is not None
    assert (wrong.field, wrong.value) == ("logger", value)
    assert LOGGERS in str(wrong)


@pytest.mark.parametrize(
    "argument",
    [
        "logger=csv",
        "logger=[csv,wandb]",
        "logger=[]",
        "~logger",
        "~logger=csv",
        "logger={csv: {name: x}}",
        "logger=csv,wandb",
        "model.dim=0",
        "+a.b=null",
        "model.dim=range(1,3)",
        "logger=glob(*)",
        "nonsense",
        "[",
        "--help",
        "a=[1",
        "x" * 300,
    ],
)
def test_what_is_right_or_of_another_kind_is_left_alone(argument: str) -> None:
    assert not_a_choice([argument]) is None


def test_an_argument_without_a_name_is_named_itself() -> None:
    wrong = not_a_choice(["@model.dim=3"])
    assert wrong is not None
    assert str(wrong) == f"argument='@model.dim=3' is not valid: expected {GRAMMAR}"


@pytest.mark.parametrize(
    ("field", "arguments", "value"),
    [
        ("model.dim", ["model.dim=3", "model.dim=4"], "4"),
        ("model.dim", ["model={dim: 4}"], 4),
        ("model.moe.top_k", ["model.moe={top_k: [1]}", "seed=1"], [1]),
        ("optm", ["optm.lr=1"], "1"),
        ("model.dim", ["+model.dim=''"], "''"),
        ("model.dim", ["model.dime=3", "x.model.dim=4", "--dim"], None),
    ],
)
def test_what_a_field_was_set_to(field: str, arguments: list[str], value: Any) -> None:
    assert given(field, arguments) == value


def test_names_are_those_of_the_files_and_stay_within_the_folder() -> None:
    assert choices("logger") == ["comet", "csv", "mlflow", "tensorboard", "wandb"]
    assert choices("") == choices("hydra/launcher") == choices("../docs") == choices("nonsense") == []


def test_a_value_nested_without_end_is_no_override() -> None:
    assert parse(["a=" + "[" * 5000]) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["+callbacks=curvature"], ["callbacks=[default,curvature]"]),
        (
            ["a=1", "callbacks=monitors", "b=2", "+callbacks=[curvature]"],
            ["a=1", "callbacks=[monitors,curvature]", "b=2"],
        ),
        (["+callbacks=curvature", "callbacks=[monitors,console]"], ["callbacks=[monitors,console,curvature]"]),
        (["+callbacks=curvature", "callbacks=[]"], ["callbacks=[curvature]"]),
        (["callbacks=a", "callbacks=b", "+callbacks=c"], ["callbacks=[b,c]"]),
        (["~callbacks"], ["callbacks=[]"]),
        (["~callbacks", "+callbacks=curvature"], ["callbacks=[curvature]"]),
        (["callbacks=[monitors]"], ["callbacks=[monitors]"]),
        (
            ["+callbacks.x.y=1", "callbacks.x=null", "~callbacks.x"],
            ["+callbacks.x.y=1", "callbacks.x=null", "~callbacks.x"],
        ),
        (["+callbacks={a: 1}"], ["+callbacks={a: 1}"]),
        (["+callbacks=]"], ["+callbacks=]"]),
        (["~logger", "--help"], ["~logger", "--help"]),
    ],
)
def test_what_is_said_of_the_callbacks_becomes_one_list(arguments: list[str], expected: list[str]) -> None:
    assert as_lists(arguments) == expected
