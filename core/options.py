"""Hold keyword arguments against the signature they are meant for, before the call."""

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from core.errors import ConfigError, UnknownField, require

_COLLECTIONS = (Collection, Iterable, Sequence)
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def check_arguments(field: str, function: Callable[..., Any], arguments: Mapping[str, Any], *hidden: str) -> None:
    """Refuse unknown names, wrong primitive types, and the lack of an argument without a default.

    Args:
        field: dotted name of the configuration group that holds the arguments.
        function: a function or class; its annotations say what is valid.
        arguments: plain values by name.
        hidden: parameters that the project fills in itself, so that a user may not.

    Raises:
        ConfigError: names the first argument that does not fit, and what would.
    """
    try:
        parameters = inspect.signature(function).parameters
    except ValueError as error:  # of some that are written in C
        name = getattr(function, "__qualname__", function)
        raise ConfigError(f"{field}._target_", name, "a class or function that says what it takes") from error
    names, open_ended = _names(parameters, hidden)
    hints = _type_hints(function)
    for name, value in arguments.items():
        if name not in names:
            if open_ended and name not in hidden:
                continue
            raise UnknownField(f"{field}.{name}", value, names)
        if not accepts(hints.get(name, Any), value):
            raise ConfigError(f"{field}.{name}", value, describe(hints[name]))
    for name in names:
        needed = parameters[name].default is inspect.Parameter.empty
        require(not needed or name in arguments, f"{field}.{name}", None, "a value: it has no default")


def check_names(field: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Refuse unknown names, where nothing is known of the values yet; see check_arguments."""
    names, open_ended = _names(inspect.signature(function).parameters)
    for name, value in arguments.items():
        if name not in names and not open_ended:
            raise UnknownField(f"{field}.{name}", value, names)


def _names(parameters: Mapping[str, inspect.Parameter], hidden: Collection[str] = ()) -> tuple[list[str], bool]:
    """Return the parameters that have a name of their own, and whether any other name is taken as well."""
    collecting = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [name for name, p in parameters.items() if name not in hidden and p.kind not in collecting]
    return names, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _type_hints(function: Callable[..., Any]) -> dict[str, Any]:
    target = function.__init__ if inspect.isclass(function) else function
    try:
        return typing.get_type_hints(target)
    except (NameError, TypeError):  # a third party's annotations that exist for type checkers only
        return {}


def accepts(hint: Any, value: Any) -> bool:
    """Return whether a plain value fits a type hint, as far as plain values can: anything else passes."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(accepts(argument, value) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    if origin is tuple or hint is tuple:
        return isinstance(value, list | tuple)
    kind = origin if inspect.isclass(origin) else hint
    if kind is Any or not inspect.isclass(kind) or not isinstance(value, bool | int | float | str | list | dict | None):
        return True
    if kind in (list, *_COLLECTIONS) and isinstance(value, list | tuple):
        return not arguments or all(accepts(arguments[0], item) for item in value)
    try:
        return isinstance(value, kind)  # and no plain value where an object is wanted
    except TypeError:  # a Protocol or a TypedDict
        return True


def describe(hint: Any) -> str:
    """Return a type hint in words: `an integer or null`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(argument) for argument in arguments)
    if origin is tuple and Ellipsis not in arguments:
        return f"[{', '.join(describe(argument) for argument in arguments)}]"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a group of fields"
    return _WORDS.get(hint) or str(getattr(hint, "__name__", hint))
