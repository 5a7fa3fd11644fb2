"""The one exception that means "the user asked for something that cannot be had"."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration value that cannot work. `train.py` prints it without a traceback and exits with 2.

    Args:
        field: dotted name of the configuration field, as the user would override it.
        value: what it was set to.
        valid: what would have been accepted, in words.
    """

    def __init__(self, field: str, value: object, valid: str) -> None:
        self.field, self.value, self.valid = field, value, valid
        super().__init__(f"{field}={value!r} is not valid: expected {valid}")

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[str, object, str]]:
        return type(self), (self.field, self.value, self.valid)


def suggest(name: str, choices: Iterable[str]) -> str:
    """`one of a, b, c`, with the nearest match where `name` looks like a slip of the keyboard."""
    names = sorted(choices)
    close = difflib.get_close_matches(name, names, n=1)
    return f"one of {', '.join(names)}" + (f" (did you mean {close[0]}?)" if close else "")


def lookup(field: str, name: str, registry: Mapping[str, T]) -> T:
    """`registry[name]`, or a ConfigError that lists the names there are."""
    if name not in registry:
        raise ConfigError(field, name, suggest(str(name), registry))
    return registry[name]


def require(condition: bool, field: str, value: object, valid: str) -> None:
    """Raise ConfigError(field, value, valid) unless the condition holds."""
    if not condition:
        raise ConfigError(field, value, valid)
