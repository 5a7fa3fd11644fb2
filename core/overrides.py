"""Command lines in Hydra's grammar: which of their overrides is at fault, and what it set a field to."""

import re
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from core.errors import ConfigError, InvalidValue, require, suggest
from core.moved import rename_fields

GRAMMAR = "FIELD=VALUE, +FIELD=VALUE for a new field, or ~FIELD to leave one out"
LISTED = ("callbacks",)
"""Groups whose default in configs/train.yaml is a list, so that +GROUP=NAME adds to it."""
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def parse(arguments: Iterable[str]) -> list[Override]:
    """Return the overrides among the arguments; what is none, as an option, is left out."""
    parser, found = OverridesParser.create(), []
    for argument in arguments:
        try:
            found.append(parser.parse_override(argument))
        except (HydraException, RecursionError):
            continue
    return found


def choices(group: str) -> list[str]:
    """Return the names among which a configuration group is chosen; none: there is no such group."""
    if not group or group.startswith("hydra") or ".." in group:
        return []
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


@cache
def top_level(config: str) -> frozenset[str]:
    """Return the names without a dot that an override can begin with: the groups, and the fields outside of them.

    Args:
        config: train or study, of which configs/ has a file.
    """
    content: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{config}.yaml"), resolve=False)
    groups = {name for entry in content.pop("defaults") if isinstance(entry, dict) for name in entry}
    return frozenset({*content, *(name for name in groups if name.isidentifier())})


def with_names_of_today(arguments: Iterable[str]) -> list[str]:
    """Return the arguments as Hydra understands them: `as_lists`, and fields that have been renamed by their new name.

    A line on stderr says each new name.
    """
    found = []
    for argument in arguments:
        renamed, notes = rename_fields(argument)
        for note in notes:
            print(note, file=sys.stderr, flush=True)
        found.append(renamed)
    return as_lists(found)


def as_lists(arguments: Iterable[str]) -> list[str]:
    """Return the arguments with what they choose of a group of LISTED in one override, as Hydra understands it.

    Hydra drops `+callbacks=curvature` beside `callbacks=[monitors]` without a word, and cannot delete such a group.

    Raises:
        ConfigError: names are to be added to each list of a sweep.
    """
    found = list(arguments)
    for group in LISTED:
        found = [f"{group}=[]" if argument in (f"~{group}", f"~{group}=default") else argument for argument in found]
        choosing = [argument for argument in found if argument.partition("=")[0] in (group, f"+{group}")]
        if (merged := _merged(group, choosing)) is not None:
            first = found.index(choosing[0])
            found = [*found[:first], merged, *(argument for argument in found[first:] if argument not in choosing)]
    return found


def _merged(group: str, arguments: list[str]) -> str | None:
    """Return one override for several that choose of a group; None where they may stay, for Hydra to judge."""
    parsed = parse(arguments)
    if len(parsed) != len(arguments) or not any(override.is_add() for override in parsed):
        return None
    chosen, added = ["default"], list[str]()
    for override in parsed:
        valid = f"whole lists where {group} is swept, as {group}=[monitors],[monitors,curvature]"
        require(not override.is_sweep_override(), group, str(override.input_line).partition("=")[2], valid)
        value: Any = override.value()
        if isinstance(value, dict) or _is_no_choice(override, value):
            return None
        names = value if isinstance(value, list) else [value]
        if override.is_add():
            added += names
        else:
            chosen = names
    return f"{group}=[{','.join([*chosen, *added])}]"


def shipped_entries(group: str) -> set[str]:
    """Return the names that the files of a group define, as callbacks.NAME."""
    files = [OmegaConf.load(CONFIGS / group / f"{choice}.yaml") for choice in choices(group)]
    return {str(name) for file in files for name in file} - {"defaults"}


def not_a_choice(arguments: Iterable[str]) -> ConfigError | None:
    """Return the error that says which configuration group is set to what is no name, and no list of names."""
    for override in parse(arguments):
        group, text = str(override.key_or_group), str(override.input_line).partition("=")[2]
        if not group:
            return ConfigError("argument", override.input_line, GRAMMAR)
        names = choices(group)
        wrong = any(_is_no_choice(override, value) for value in _values(override))
        if wrong and group.partition("/")[0] in ("hydra", "schema"):
            return ConfigError(group, text, "the name of one of its configurations")
        if wrong and names:
            without = f"; ~{group} leaves it out" if override.value() is None else ""
            return ConfigError(group, text, f"{suggest(text, names)}, or a list of such names{without}")
    return None


def broken_reference(field: str, message: str, arguments: Iterable[str]) -> ConfigError | None:
    """Return the error of the override that made a reference fail; None where none did, or the field's own did.

    Args:
        field: the field in which the reference was resolved; it may only lead to the one that was overridden.
        message: what OmegaConf says of it, with the name or variable that is not there in quotes.
        arguments: of the command line.
    """
    missing = re.findall(r"'([\w.:-]+)'", message)
    for override in parse(arguments):
        name, text = str(override.key_or_group), str(override.input_line).partition("=")[2]
        if override.is_delete() and name in missing:
            return InvalidValue("argument", override.input_line, f"{field} refers to it, and has to be set besides")
        if name != field and "${" in text and any(part in text for part in missing):
            return InvalidValue(name, text, message)
    return None


def _values(override: Override) -> list[Any]:
    """Return the values of a sweep over choices, or the only one; none of a sweep of another kind."""
    value: Any = override.value()
    if isinstance(value, ChoiceSweep):
        return list(value.list)
    return [] if override.is_sweep_override() else [value]


def _is_no_choice(override: Override, value: Any) -> bool:
    if isinstance(value, dict):  # fields of the group
        return False
    if override.is_delete():
        return value is not None and not isinstance(value, str)
    names = value if isinstance(value, list) else [value]
    return not all(isinstance(name, str) and name for name in names)


def given(field: str, arguments: Iterable[str]) -> Any:
    """Return what the overrides set a field to, as their text where it is set by itself, else from the group's value.

    The last of several counts; None where none of them sets it, or something below it.
    """
    arguments = list(arguments)
    for argument in reversed(arguments):
        name, _, text = argument.partition("=")
        name = name.lstrip("+~")
        if f"{name}.".startswith(f"{field}."):
            return text
        if field.startswith(f"{name}.") and name:
            for override in parse([argument]):
                value: Any = override.value()
                for part in field.removeprefix(f"{name}.").split("."):
                    value = value.get(part) if isinstance(value, dict) else None
                if value is not None:
                    return value
    return None
