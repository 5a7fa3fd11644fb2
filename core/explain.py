"""Turns the configuration libraries' errors into ConfigErrors: field, value, and what would be valid."""

import dataclasses
import re
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from core.errors import ConfigError, suggest

_TYPE_NAMES = {"Integer": "an integer", "Float": "a number", "Boolean": "true or false", "String": "text"}


def explain_omegaconf(error: OmegaConfBaseException, prefix: str = "", value: Any = None) -> ConfigError:
    """The ConfigError that says the same as an OmegaConf error.

    Args:
        error: an unknown key or a value of the wrong type.
        prefix: dotted name of the group in which the error's own key stands.
        value: what the user gave, where the error does not carry it.
    """
    field = ".".join(part for part in (prefix, error.full_key or str(error.key or "")) if part)
    message = str(error.msg or error).splitlines()[0]
    if isinstance(error, ConfigKeyError | AttributeError):
        return ConfigError(field, value, f"no such field; {suggest(str(error.key), _siblings(error))}")
    if isinstance(error, ValidationError):
        given = re.search(r"'(.*)' of type", message)
        wanted = re.search(r"converted to (\w+)", message)
        valid = _TYPE_NAMES.get(wanted[1], wanted[1]) if wanted else message
        return ConfigError(field, given[1] if given else value, valid)
    return ConfigError(field, value, message)


def _siblings(error: OmegaConfBaseException) -> list[str]:
    if dataclasses.is_dataclass(error.object_type):
        return [field.name for field in dataclasses.fields(error.object_type)]
    return [str(key) for key in error.parent_node] if isinstance(error.parent_node, DictConfig) else []
