"""Errors that name field, value and choices."""

import pickle

import pytest

from core.errors import ConfigError, InvalidValue, UnknownField, UserError, lookup, require, suggest, writing


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConfigError("a.b", 3, "an even number"), "a.b=3 is not valid: expected an even number"),
        (InvalidValue("a.b", "x", "it is too late."), "a.b='x' is not valid: it is too late."),
        (
            UnknownField("a.lrs", 1, ["lr", "dim"]),
            "a.lrs=1 is not valid: no such field; one of dim, lr (did you mean lr?)",
        ),
    ],
)
def test_messages_survive_a_trip_to_another_process(error: ConfigError, message: str) -> None:
    assert isinstance(error, UserError)
    assert str(error) == message
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == message
    assert (copy.field, copy.value, copy.valid) == (error.field, error.value, error.valid)


def test_a_slip_of_the_keyboard_is_guessed_and_nothing_else() -> None:
    assert suggest("spanorm", ["prenorm", "spannorm"]) == "one of prenorm, spannorm (did you mean spannorm?)"
    assert suggest("xyz", {"b": 1, "a": 2}) == "one of a, b"


def test_lookup_and_require() -> None:
    assert lookup("a", "one", {"one": 1}) == 1
    with pytest.raises(ConfigError, match=r"a='tow' is not valid: expected one of one, two \(did you mean two\?\)"):
        lookup("a", "tow", {"one": 1, "two": 2})
    require(True, "a", 1, "anything")
    with pytest.raises(ConfigError, match="a=1 is not valid: expected 2"):
        require(False, "a", 1, "2")


def test_a_full_disk_is_the_users_to_mend() -> None:
    with (
        pytest.raises(ConfigError, match=r"run_dir='x' is not valid: .* \(No space left on device\)"),
        writing("run_dir", "x"),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(KeyError), writing("run_dir", "x"):
        raise KeyError("a fault is no refusal")
