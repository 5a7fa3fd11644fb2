"""Resolves a name to a class or function: one of a registry, or one of the user's own by its import path."""

import difflib
import importlib
import re
from collections.abc import Mapping
from typing import TypeVar

from spannorm.errors import InvalidArgument

T = TypeVar("T")

IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)


def is_import_path(name: object) -> bool:
    """Return whether a name reads as `my_file.MyNorm` rather than as an entry of a registry."""
    return isinstance(name, str) and IMPORT_PATH.fullmatch(name) is not None


def find(argument: str, name: str, registry: Mapping[str, T]) -> T:
    """Return `registry[name]`, or what the import path `name` leads to. The latter imports its module.

    Args:
        argument: what the caller's argument is called, for the message.
        name: a key of the registry, or an import path such as `my_file.MyNorm`.
        registry: the entries that have a name.

    Raises:
        InvalidArgument: there is no such entry, or nothing that can be called at that path.
    """
    if name in registry:
        return registry[name]
    if not is_import_path(name):
        close = difflib.get_close_matches(str(name), registry, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        valid = f"one of {', '.join(sorted(registry))}{meant}, or an import path as my_file.MyClass"
        raise InvalidArgument(argument, name, valid)
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # an import runs the module, which may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InvalidArgument(argument, name, f"a class or function that can be imported ({reason})") from error
    if not callable(found):
        raise InvalidArgument(argument, name, f"a class or function, not a {type(found).__name__}")
    return found
