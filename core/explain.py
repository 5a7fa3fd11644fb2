"""Turns the configuration libraries' errors into ConfigErrors: field, value, and what would be valid."""

import dataclasses
import inspect
import pydoc
import re
import typing
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from core.errors import ConfigError, InvalidValue, UnknownField, suggest
from core.moved import current_name
from core.options import describe
from core.overrides import choices as group_choices


def explain_omegaconf(error: OmegaConfBaseException, prefix: str = "", value: Any = None) -> ConfigError:
    """Return the ConfigError that says the same as an OmegaConf error.

    Args:
        error: an unknown key or a value of the wrong type.
        prefix: dotted name of the group in which the error's own key stands.
        value: what the user gave, where the error does not carry it.
    """
    field = ".".join(part for part in (prefix, error.full_key or str(error.key or "")) if part)
    message = str(error.msg or error).splitlines()[0]
    if message.startswith("Cannot merge DictConfig with"):
        return ConfigError(field, value, "a group of fields")
    if isinstance(error, ConfigKeyError | AttributeError):
        return _unknown(field, value, error)
    if isinstance(error, ValidationError) and (wanted := _wanted(error)):
        given = re.search(r"'(.*)' of type", message)
        return ConfigError(field, given[1] if given else value, wanted)
    return InvalidValue(field, value, message)


def _wanted(error: ValidationError) -> str | None:
    """Return the declared type of the field, in words."""
    if dataclasses.is_dataclass(error.object_type):
        return describe(typing.get_type_hints(error.object_type)[str(error.key)])
    return describe(error.ref_type) if error.ref_type not in (None, Any) else None  # an item of a list


def _unknown(field: str, value: Any, error: OmegaConfBaseException) -> ConfigError:
    if names := group_choices(field):
        return ConfigError(field, value, f"{suggest(str(value), names)}, chosen before anything in it is set")
    siblings = _siblings(error)
    choices = [name for name in siblings if not name.startswith("_")]
    if "_target_" not in siblings:
        return UnknownField(field, value, choices)
    target = error.parent_node["_target_"]
    taken = _parameters(str(target))
    if field.rpartition(".")[2] in taken:
        return InvalidValue(
            field, value, f"the configuration does not set it yet; +{field}={value} hands it on to {target}"
        )
    return UnknownField(field, value, {*choices, *taken})


def _parameters(target: str) -> Iterable[str]:
    """Return the names that a `_target_` takes; none where it cannot be imported."""
    try:
        return inspect.signature(pydoc.locate(current_name(target))).parameters  # type: ignore[arg-type]
    except (pydoc.ErrorDuringImport, TypeError, ValueError):
        return ()


def _siblings(error: OmegaConfBaseException) -> list[str]:
    if dataclasses.is_dataclass(error.object_type):
        return [field.name for field in dataclasses.fields(error.object_type)]
    return [str(key) for key in error.parent_node] if isinstance(error.parent_node, DictConfig) else []
