"""FIELD=VALUE against a dataclass: types, what comes without a name, overrides, old options, and the help."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from core.dataclass_cli import FIRST, OVERRIDES, describe_fields, field_docs, parse_fields
from core.errors import ConfigError, UserError


@dataclass(frozen=True)
class Settings:
    """An example.

    Attributes:
        runs: what is read.
        size: how large,
            in two lines.
        rate: a share.
        name, other: texts.
        kind: one of two.
        tags: several.
        counts: several numbers.
        output: where to.
        fast: a switch.
    """

    runs: tuple[Path, ...] = field(metadata=FIRST)
    size: int
    rate: float = 1.0
    name: str = ""
    other: str | None = None
    kind: Literal["small", "large"] = "small"
    tags: tuple[str, ...] = ()
    counts: tuple[int, ...] = (1, 2)
    output: Path | None = field(default=None, metadata={"formerly": "out_file"})
    fast: bool = False


@dataclass(frozen=True)
class Planned:
    """An example that takes overrides of train.py.

    Attributes:
        overrides: as for train.py.
        mfu: a share.
    """

    overrides: tuple[str, ...] = field(default=("model=dense",), metadata=OVERRIDES)
    mfu: float = 0.4


def test_values_have_the_types_of_their_fields() -> None:
    given = ["a", "size=3", "runs/b=c", "rate=1e-3", "name=x=${y}, z", "other=null", "kind=large"]
    given += ["tags=a/b, c", "counts=[3,4]", "output=x.png", "fast=True", "size=4"]
    runs, tags = (Path("a"), Path("runs/b=c")), ("a/b", "c")
    expected = Settings(runs, 4, 1e-3, "x=${y}, z", None, "large", tags, (3, 4), Path("x.png"), True)
    assert parse_fields(Settings, given) == expected
    empty = Settings((Path("a"),), 1, other="", counts=())
    assert parse_fields(Settings, ["a", "size=1", "counts=[ ]", "other="]) == empty


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["size=1"], "RUNS=None is not valid: expected a path"),
        (["a"], "size=None is not valid: expected a value: it has no default"),
        (["a", "siz=1"], r"siz='1' is not valid: no such field; one of .* \(did you mean size\?\)"),
        (["a", "size=1.5"], "size='1.5' is not valid: expected an integer$"),
        (["a", "size=null"], "size='null' is not valid: expected an integer$"),
        (["a", "size=1", "rate=x"], "rate='x' is not valid: expected a number"),
        (["a", "size=1", "kind=smal"], "kind='smal' is not valid: expected one of small, large$"),
        (["a", "size=1", "counts=1,x"], "counts='1,x' is not valid: expected an integer, or several with commas"),
        (["a", "size=1", "fast=2"], "fast='2' is not valid: expected true or false"),
        (
            ["a", "size=1", "output="],
            "output='' is not valid: expected a path or null: empty, as from a shell variable",
        ),
        (["a", "size=1", "output=a\0b"], "expected a path or null: there is a null character in it"),
        (["a", "", "size=1"], "RUNS='' is not valid: expected a path: empty, as from a shell variable"),
        (
            ["a", "size=1", f"output={'b' * 256}"],
            "output='b{256}' is not valid: .* a name in it has more than 255 bytes",
        ),
        (["a", "size=1", "tags="], "tags='' is not valid: expected text, or several with .* them; \\[\\] is none$"),
        (["a", "size=1", "tags=b,,c"], "tags='b,,c' is not valid"),
        (["a", "size=1", "tags=[b,]"], r"tags='\[b,\]' is not valid"),
        (["a", "size=1", "counts=,"], "counts=',' is not valid"),
        (["a", "size=1", "runs=b"], "runs='b' is not valid: no such field"),
    ],
)
def test_a_mistake_names_field_value_and_what_would_be_valid(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_fields(Settings, given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a", "--size", "3"], "--size 3 is now size=3"),
        (["a", "--size=3", "b"], "--size=3 is now size=3"),
        (["--fast", "a"], "--fast is now fast=true"),
        (["a", "--tags", "b", "c", "--fast"], "--tags b c is now tags=b,c; --fast is now fast=true"),
        (["a", "--tags", "b", "--tags", "c"], "--tags b --tags c is now tags=b,c"),
        (["a", "--out-file", "x"], "--out-file x is now output=x"),
        (["a", "--rate", "-1"], "--rate -1 is now rate=-1"),
        (["a", "--size"], "--size is now size=VALUE"),
    ],
)
def test_an_old_option_is_answered_by_its_new_spelling(given: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_fields(Settings, given)
    assert str(error.value) == message


def test_an_option_that_never_was_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"--sise=None is not valid: no such field; one of .* \(did you mean size\?\)"
    ):
        parse_fields(Settings, ["a", "--sise", "3"])


def test_what_is_no_own_field_is_an_override() -> None:
    assert parse_fields(Planned, []) == Planned()
    given = ["model.dim=3", "mfu=0.2", "+x=1", "~callbacks", "experiment=a", "hydra/launcher=b", "seed=1"]
    overrides = ("model.dim=3", "+x=1", "~callbacks", "experiment=a", "hydra/launcher=b", "seed=1")
    assert parse_fields(Planned, given) == Planned(overrides, 0.2)
    with pytest.raises(ConfigError, match=r"mfuu='1' is not valid: no such field; .*, mfu, .*did you mean mfu"):
        parse_fields(Planned, ["mfuu=1"])


def test_the_help_has_each_field_with_type_default_and_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert field_docs(Settings)["size"] == "how large, in two lines."
    lines = [" ".join(line.split()) for line in describe_fields(Settings).splitlines()]
    assert lines == [
        "RUNS ... what is read.",
        "size=... how large, in two lines (an integer, required)",
        "rate=1.0 a share (a number)",
        "name= texts (text)",
        "other=null texts (text or null)",
        "kind=small one of two (one of small, large)",
        "tags=[] several (text, or several with commas between them)",
        "counts=1,2 several numbers (an integer, or several with commas between them)",
        "output=null where to (a path or null)",
        "fast=false a switch (true or false)",
    ]
    assert "FIELD=VALUE ...  as for train.py." in describe_fields(Planned)
