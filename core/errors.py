"""Errors that the user can mend: `train.py` prints them without a traceback and exits with 2."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """The base of all of them."""


class ConfigError(UserError, ValueError):
    """A configuration value that cannot work.

    Args:
        field: dotted name of the configuration field, as the user would override it.
        value: what it was set to.
        valid: what would have been accepted, in words.
    """

    template = "{}={!r} is not valid: expected {}"

    def __init__(self, field: str, value: object, valid: str) -> None:
        self.field, self.value, self.valid = field, value, valid
        super().__init__(self.template.format(field, value, valid))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.valid)


class InvalidValue(ConfigError):
    """A value that cannot work for a reason that stands in `valid` as a sentence of its own."""

    template = "{}={!r} is not valid: {}"


class UnknownField(InvalidValue):
    """A field that does not exist; `valid` lists those that do."""

    def __init__(self, field: str, value: object, choices: Iterable[str]) -> None:
        self.choices = sorted(choices)
        super().__init__(field, value, f"no such field; {suggest(field.rpartition('.')[2], self.choices)}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.choices)


def one_line(message: object) -> str:
    """Return what others say over several lines, as one."""
    return re.sub(r"\s+", " ", str(message)).strip()


def suggest(name: str, choices: Iterable[str]) -> str:
    """Return `one of a, b, c`, with the nearest match where `name` looks like a slip of the keyboard."""
    names = sorted(choices)
    close = difflib.get_close_matches(name, names, n=1)
    return f"one of {', '.join(names)}" + (f" (did you mean {close[0]}?)" if close else "")


def lookup(field: str, name: str, registry: Mapping[str, T]) -> T:
    """Return `registry[name]`, or raise a ConfigError that lists the names there are."""
    if name not in registry:
        raise ConfigError(field, name, suggest(str(name), registry))
    return registry[name]


def require(condition: bool, field: str, value: object, valid: str) -> None:
    """Raise ConfigError(field, value, valid) unless the condition holds."""
    if not condition:
        raise ConfigError(field, value, valid)


@contextmanager
def writing(field: str, folder: object) -> Iterator[None]:
    """Turn what the file system refuses, in the folder that a field names, into a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(field, str(folder), f"a folder that can be written to ({error.strerror})") from error
