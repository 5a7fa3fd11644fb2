"""Arguments held against signatures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from core.errors import ConfigError
from core.options import accepts, check_arguments, describe


@pytest.mark.parametrize(
    ("hint", "good", "bad", "words"),
    [
        (int, [1, -1], [1.0, True, "1", None, [1]], "an integer"),
        (float, [1, 1.5], [True, "1"], "a number"),
        (bool, [True, False], [0, "yes"], "true or false"),
        (str, ["a"], [1, None], "text"),
        (int | None, [1, None], ["a"], "an integer or null"),
        (Literal["a", "b"], ["a"], ["c", 1], "one of 'a', 'b'"),
        (list[int], [[1], []], ["a", 1, {}, ["a"]], "list"),
        (tuple[float, float], [(0.1, 0.2), [1, 2]], [0.1], "[a number, a number]"),
        (dict[str, int], [{"a": 1}], [[1], 1], "a group of fields"),
        (Any, [1, "a", None, [1]], [], "Any"),
        (pytest.MonkeyPatch, [], [1, "a", None, [1], {}], "MonkeyPatch"),
        (Sequence[int], [[1], (1,), []], [["a"], 1, {}], "Sequence"),
        (Mapping[str, int], [{}], [[]], "Mapping"),
        (str | Path, ["a", Path("a")], [[], {}, 1], "text or Path"),
    ],
    ids=str,
)
def test_plain_values_against_type_hints(hint: Any, good: list[Any], bad: list[Any], words: str) -> None:
    assert all(accepts(hint, value) for value in good)
    assert not any(accepts(hint, value) for value in bad)
    assert describe(hint) == words


def function(size: int, name: str = "a", *rest: int, **options: int) -> None: ...


class Closed:
    def __init__(self, depth: int, std: float = 0.1) -> None: ...


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "a"}, "g.size='a' is not valid: expected an integer"),
        ({"name": "b"}, "g.size=None is not valid: expected a value: it has no default"),
        ({"size": 1, "name": 2}, "g.name=2 is not valid: expected text"),
    ],
)
def test_what_a_function_does_not_take(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        check_arguments("g", function, arguments)


def test_keyword_arguments_are_open_and_hidden_ones_closed() -> None:
    check_arguments("g", function, {"size": 1, "anything": 2})
    check_arguments("g", Closed, {"std": 1}, "depth")
    for name in ("depth", "sdt", "rest"):
        with pytest.raises(ConfigError, match=rf"g\.{name}=2 is not valid: no such field; one of std"):
            check_arguments("g", Closed, {name: 2}, "depth")


def test_hints_that_exist_for_type_checkers_only_are_no_obstacle() -> None:
    def foreign(a: "NotImported") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    check_arguments("g", foreign, {"a": 1})
