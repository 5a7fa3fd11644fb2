"""Command lines of the form FIELD=VALUE, held against a dataclass."""

import dataclasses
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.errors import UnknownField, require
from core.explain import explain_omegaconf

T = TypeVar("T")


def parse_fields(schema: type[T], arguments: Iterable[str], instead: str = "") -> T:
    """FIELD=VALUE, ... -> the typed settings. Text is taken as it is, `null` is None where a field may be None.

    Args:
        schema: a dataclass, whose defaults count.
        arguments: of the command line.
        instead: what else could stand there, for the message.

    Raises:
        ConfigError: no such field, a value of the wrong type, or a field left out that has no default.
    """
    fields: dict[str, Any] = {field.name: field for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(schema)
    texts: dict[str, str | None] = {}
    others: dict[str, str | None] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        require(bool(equals), "argument", argument, f"FIELD=VALUE{instead}")
        if name not in fields:
            raise UnknownField(name, value, fields)
        optional = type(None) in typing.get_args(hints[name])
        is_text = hints[name] is str or str in typing.get_args(hints[name])
        (texts if is_text else others)[name] = None if optional and value == "null" else value
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            require(bool(texts.get(name)), name, texts.get(name), "a value: it has no default")
    try:
        # Not the texts: OmegaConf would look for ${...} in them.
        node: Any = OmegaConf.merge(OmegaConf.structured(schema), others)
    except OmegaConfBaseException as error:
        raise explain_omegaconf(error, value=others.get(str(error.full_key))) from error
    return schema(**{name: node[name] for name in others}, **texts)
