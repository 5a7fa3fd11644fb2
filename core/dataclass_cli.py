"""Command lines of the form FIELD=VALUE, held against a dataclass, whose docstring says what each field is.

What a tool reads comes first, without a name: RUN, or FOLDER. A tool that takes the overrides of train.py hands on what
is no field of its own.
"""

import dataclasses
import inspect
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from core.errors import ConfigError, UnknownField, UserError, require
from core.options import describe
from core.overrides import top_level
from core.paths import require_path

T = TypeVar("T")
FIRST = {"given": "first"}
"""Metadata of the field, a path or several, that is given before the others and without a name."""
OVERRIDES, STUDY_OVERRIDES = ({"overrides_of": name} for name in ("train", "study"))
"""Metadata of the field that gets every argument which is none of the other fields: overrides of that configuration."""


class _Schema:
    """A dataclass as a command line sees it.

    Attributes:
        first, overrides: the fields with that metadata.
        named: the others, by name.
        hints: the types of all of them.
    """

    def __init__(self, schema: type) -> None:
        fields = dataclasses.fields(schema)
        self.first = next((field for field in fields if field.metadata == FIRST), None)
        self.overrides = next((field for field in fields if "overrides_of" in field.metadata), None)
        self.named = {field.name: field for field in fields if field not in (self.first, self.overrides)}
        self.hints = typing.get_type_hints(schema)

    def names(self) -> set[str]:
        """Return what can stand before the equals sign: own fields, and the first parts of overrides."""
        return {*self.named, *(top_level(self.overrides.metadata["overrides_of"]) if self.overrides else ())}


def parse_fields(schema: type[T], arguments: Iterable[str]) -> T:
    """Return the settings that a command line gives: FIELD=VALUE, and first what has no name.

    Text is taken as it is, several values have commas between them, and `null` is None where a field may be None. Of
    several values `[]` is none: nothing at all, as of a shell variable that is not set, is refused, and so is an empty
    path.

    Args:
        schema: a dataclass, whose defaults count.
        arguments: of the command line.

    Raises:
        ConfigError: no such field, a value of the wrong type, or a field left out that has no default.
        UserError: an option with dashes; it says how that is written.
    """
    known, arguments = _Schema(schema), list(arguments)
    _refuse_options(known, arguments)
    several = known.first is not None and typing.get_origin(known.hints[known.first.name]) is tuple
    texts: dict[str, str] = {}
    first, overrides = list[Path](), list[str]()
    for argument in arguments:
        name, equals, value = argument.partition("=")
        named = bool(equals) and name.isidentifier()
        if named and name in known.named:
            texts[name] = value
        elif known.overrides is not None:
            if named and name not in known.names():
                raise UnknownField(name, value, known.names())
            overrides.append(argument)
        elif known.first is not None and not named and (several or not first):
            require_path(known.first.name.upper(), argument, "a path")
            first.append(Path(argument))
        else:
            require(bool(equals), "argument", argument, "FIELD=VALUE")
            raise UnknownField(name, value, known.named)
    values: dict[str, Any] = {}
    if known.first is not None:
        required = known.first.default is dataclasses.MISSING
        require(bool(first) or not required, known.first.name.upper(), None, "a path, before all FIELD=VALUE")
        values |= {known.first.name: tuple(first) if several else first[0]} if first else {}
    for name, field in known.named.items():
        if field.default is dataclasses.MISSING:
            require(bool(texts.get(name)), name, texts.get(name), "a value: it has no default")
    values |= {name: _value(name, known.hints[name], text) for name, text in texts.items()}
    if known.overrides is not None and overrides:
        values[known.overrides.name] = tuple(overrides)
    return schema(**values)


def _value(name: str, hint: Any, text: str) -> Any:
    kinds = _kinds(hint)
    if types.NoneType in kinds and text == "null":
        return None
    if kinds[0] is Path:
        require_path(name, text, _words(hint))
    try:
        return _converted(kinds[0], text)
    except (ValueError, KeyError):
        none = "; [] is none" if typing.get_origin(kinds[0]) is tuple else ""
        raise ConfigError(name, text, f"{_words(hint)}{none}") from None


def _kinds(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)


def _converted(kind: Any, text: str) -> Any:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        inside = text[1:-1].strip() if re.fullmatch(r"\[.*\]", text, re.DOTALL) else text
        parts = [] if text != inside == "" else [part.strip() for part in inside.split(",")]
        if "" in parts:
            raise ValueError
        return tuple(_converted(arguments[0], part) for part in parts)
    if typing.get_origin(kind) is typing.Literal:
        return {argument: argument for argument in arguments}[text]
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    return kind(text)


def _words(hint: Any) -> str:
    """Return a type in words: what `describe` says, and of several values the type of each."""
    if typing.get_origin(hint) is tuple:
        return f"{_words(typing.get_args(hint)[0])}, or several with commas between them"
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    return " or ".join("a path" if kind is Path else describe(kind) for kind in _kinds(hint))


def _refuse_options(known: _Schema, arguments: list[str]) -> None:
    """Raise UserError where there are options with dashes, as tools once took them; it says how each is written."""
    old_names = {field.metadata.get("formerly", name): name for name, field in known.named.items()}
    given: dict[str, list[str]] = {}
    values: dict[str, list[str]] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            continue
        option, equals, value = argument.partition("=")
        name = old_names.get(option.lstrip("-").replace("-", "_"))
        if name is None:
            raise UnknownField(option, value or None, known.names())
        hint = known.hints[name]
        if equals:
            words = [value]
        elif typing.get_origin(hint) is tuple and name != "allow":
            words = list(takewhile(lambda word: not word.startswith("-"), rest))
        else:
            words = [] if hint is bool else rest[:1]
        rest = rest[0 if equals else len(words) :]
        given.setdefault(name, []).extend([argument, *([] if equals else words)])
        values.setdefault(name, []).extend(["true"] if hint is bool else words or ["VALUE"])
    if given:
        now = (f"{' '.join(given[name])} is now {name}={','.join(values[name])}" for name in given)
        raise UserError("; ".join(now))


def describe_fields(schema: type) -> str:
    """Return a table of what a command line may hold: each field as it is by default, its type, and what it is for."""
    known, docs = _Schema(schema), field_docs(schema)
    rows = []
    if known.first is not None:
        several = " ..." if typing.get_origin(known.hints[known.first.name]) is tuple else ""
        default = "" if known.first.default is dataclasses.MISSING else f" By default {known.first.default}."
        rows.append((f"{known.first.name.upper()}{several}", f"{docs[known.first.name]}{default}"))
    if known.overrides is not None:
        rows.append(("FIELD=VALUE ...", docs[known.overrides.name]))
    for name, field in known.named.items():
        needed = ", required" if field.default is dataclasses.MISSING else ""
        text = f"{docs[name].rstrip('.')} ({_words(known.hints[name])}{needed})"
        rows.append((f"{name}={_as_text(field.default)}", text))
    width = min(max(len(left) for left, _ in rows), 28) + 2
    columns = max(shutil.get_terminal_size((120, 24)).columns, 60)
    lines = []
    for left, right in rows:
        wrapped = textwrap.wrap(right, columns - width - 2)
        if len(left) > width - 2:
            lines.append(f"  {left}")
            left = ""
        starts = [left, *[""] * (len(wrapped) - 1)]
        lines += [f"  {start:<{width}}{text}" for start, text in zip(starts, wrapped, strict=True)]
    return "\n".join(lines)


def _as_text(default: Any) -> str:
    if default is dataclasses.MISSING:
        return "..."
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or "[]"
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def field_docs(schema: type) -> dict[str, str]:
    """Return what the docstring of a dataclass says, under `Attributes:`, of each field."""
    _, _, section = (inspect.getdoc(schema) or "").partition("\nAttributes:\n")
    entries = re.split(r"\n(?=    \w)", f"\n{section}")[1:]
    docs: dict[str, str] = {}
    for names, _, text in (" ".join(entry.split()).partition(": ") for entry in entries):
        docs |= dict.fromkeys(names.split(", "), text)
    return docs
