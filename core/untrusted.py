"""Readers of files that may come from a stranger: they wait for nothing, take bounded memory, and build plain data.

Every bound is a number here or beside its reader. The environment variable READ_LIMITS multiplies them all:
whoever trusts a file that is beyond one sets READ_LIMITS=10.
"""

import functools
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from core.errors import UserError, one_line
from core.limits import factor

VARIABLE = "READ_LIMITS"
MIB = 1 << 20
JSON_BYTES = 16 * MIB
JSON_DEPTH = 200  # of pydantic's parser
JSON_MEMORY = 512 * MIB  # that what a JSON text holds takes in Python; `[],` has 3 bytes, and becomes over 100
YAML_BYTES, YAML_NODES, YAML_DEPTH, YAML_SCALAR = MIB, 20_000, 64, 4096
NAMED = 3  # of the faults that a schema finds


class Untrusted(UserError):
    """A file that is refused; says which and why."""


def bound(number: int) -> int:
    """Return the bound as the user wants it: READ_LIMITS times as large.

    Raises:
        UserError: READ_LIMITS is no number of at least 1.
    """
    return int(number * factor(VARIABLE))


def beyond(what: str, number: int) -> str:
    """Return the words for what is beyond a bound: `what` says it, `number` is the bound before READ_LIMITS."""
    return f"{what}; the bound is {bound(number):,}, and {VARIABLE}=10 in the environment makes it ten times as large"


def read_bytes(path: Path, limit: int = JSON_BYTES) -> bytes:
    """Return the content of a regular file of at most `bound(limit)` bytes; a pipe or a device is not waited for.

    Raises:
        Untrusted: it is not there, no regular file, cannot be read, or larger.
    """
    most = bound(limit)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise Untrusted(f"{path} is no regular file")
            content = file.read(most + 1) if os.fstat(descriptor).st_size <= most else None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise Untrusted(f"{path} cannot be read: {getattr(error, 'strerror', None) or one_line(error)}") from error
    if content is None or len(content) > most:
        raise Untrusted(beyond(f"{path} has more than {most:,} bytes", limit))
    return content


def open_regular(path: Path) -> IO[bytes]:
    """Return a regular file, opened to be read in parts; a pipe or a device is not waited for.

    Raises:
        OSError: it is not there, or may not be read.
        Untrusted: it is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Untrusted(f"{path} is no regular file")
    return os.fdopen(descriptor, "rb")


def is_within(folder: Path, path: Path) -> bool:
    """Return whether a path lies in a folder once all links are followed; one in circles leads nowhere."""
    # pathlib's resolve raises RuntimeError at a circle.
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def within(folder: Path, path: Path, remedy: str) -> Path:
    """Return the path, below a folder that may come from a stranger, unless a link on the way leads out of the folder.

    Raises:
        Untrusted: it does; `remedy` says what to do instead.
    """
    if not is_within(folder, path):
        raise Untrusted(f"{path} leads out of {folder} by a link: nothing is written there; {remedy}")
    return path


_LIST, _OBJECT, _VALUE, _TEXT = 72, 240, 40, 60  # bytes that one takes in Python; of a text, beside its letters


def check_json(text: bytes | str, where: object) -> None:
    """Refuse a JSON text whose values would take more than JSON_MEMORY, before any of them is made.

    Raises:
        Untrusted: it has too many values.
    """
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    most = bound(JSON_MEMORY)
    # The first two look at nothing, or at texts too: brackets in a text are no values.
    if _OBJECT * len(content) > most and _memory(content) > most and sum(map(_memory, _beside_texts(content))) > most:
        what = f"{where} has too many values: they would take more than {most:,} bytes of memory"
        raise Untrusted(beyond(what, JSON_MEMORY))


def _memory(content: bytes) -> int:
    lists, objects, values, texts = (content.count(sign) for sign in (b"[", b"{", b",", b'"'))
    return _LIST * lists + _OBJECT * objects + _VALUE * values + _TEXT * (texts // 2)


def _beside_texts(content: bytes) -> Iterator[bytes]:
    """Yield what stands between the texts, which are left empty, a part at a time."""
    import numpy as np

    content = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    is_inside = 0
    for start in range(0, len(content), MIB):
        part = np.frombuffer(content, np.uint8, min(MIB, len(content) - start), start)
        inside = (np.cumsum(part == ord('"')) + is_inside) % 2
        is_inside = int(inside[-1])
        yield part[inside == 0].tobytes().replace(b'"', b'""')  # the second of each pair is there, and closes one


def parse_json(text: bytes | str, where: object, schema: Any = Any) -> Any:
    """Return what a JSON text holds, at most JSON_DEPTH levels deep and within JSON_MEMORY, as the schema's type.

    Args:
        text: UTF-8.
        where: what it is of, for the message.
        schema: a dataclass or another type that pydantic knows; its values are taken as they stand, none is converted.

    Raises:
        Untrusted: it is no JSON, too deep, has too many values, or is not of the schema: names the field, the value and
            what would be valid.
    """
    check_json(text, where)
    try:
        if schema is Any:
            return from_json(text)
        return _adapter(schema).validate_json(text, strict=True)
    except ValidationError as error:
        raise Untrusted(f"{where} cannot be read: {faults(error)}") from error
    except ValueError as error:
        deep = "recursion limit" in str(error)
        reason = f"it is nested more than {JSON_DEPTH} levels deep" if deep else one_line(error)
        raise Untrusted(f"{where} cannot be read: {reason}") from error


def faults(error: ValidationError) -> str:
    """Return the first faults that pydantic found, each with its field and its value, in one line."""
    said = []
    for fault in error.errors(include_url=False)[:NAMED]:
        field = ".".join(str(part) for part in fault["loc"]) or "the whole"
        value = repr(fault["input"])
        whole = isinstance(fault["input"], dict | list) or fault["type"] == "json_invalid"
        shown = "" if whole else f"={value if len(value) <= 60 else value[:60] + '…'}"
        reason = one_line(fault["msg"])
        if "recursion limit" in reason:
            field, shown, reason = "the whole", "", f"it is nested more than {JSON_DEPTH} levels deep"
        said.append(f"{field if len(field) <= 200 else field[:200] + '…'}{shown}: {reason}")
    rest = error.error_count() - len(said)
    return "; ".join(said) + (f"; and {rest} more" if rest else "")


def read_json(path: Path, schema: Any = Any, limit: int = JSON_BYTES) -> Any:
    """Return what a JSON file holds; see `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, limit), path, schema)


def check_yaml(text: bytes | str, where: object) -> None:
    """Refuse a YAML text whose reading could take long, much memory, or all of the stack, before anything is built.

    Aliases are refused altogether: nothing that this project writes has any, and a few of them unfold to anything. So
    are tags: what they make of a list, another reader of the same text may see differently.

    Raises:
        Untrusted: it is no YAML, has aliases or tags, too many or too long values, or is nested too deep.
    """
    import yaml

    depth = nodes = 0
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if isinstance(event, yaml.AliasEvent):
                raise Untrusted(f"{where} holds the alias *{event.anchor}; a file of this project has none")
            if isinstance(event, yaml.NodeEvent):
                nodes += 1
                if (tag := getattr(event, "tag", None)) is not None:
                    raise Untrusted(f"{where} holds the tag {str(tag)[:100]}; a file of this project has none")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if nodes > bound(YAML_NODES):
                raise Untrusted(beyond(f"{where} has too many values", YAML_NODES))
            if depth > YAML_DEPTH:
                raise Untrusted(f"{where} is nested more than {YAML_DEPTH} levels deep")
            if isinstance(event, yaml.ScalarEvent) and len(event.value) > bound(YAML_SCALAR):
                raise Untrusted(beyond(f"{where} has a value of {len(event.value):,} characters", YAML_SCALAR))
    except (yaml.YAMLError, ValueError) as error:
        raise Untrusted(f"{where} cannot be read: {one_line(error)}") from error


def parse_yaml(text: bytes | str, where: object) -> Any:
    """Return what a YAML text holds: mappings, lists, texts, numbers, nothing else.

    Raises:
        Untrusted: as of `check_yaml`, or it names types of its own.
    """
    import yaml

    check_yaml(text, where)
    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        raise Untrusted(f"{where} cannot be read: {one_line(error)}") from error


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds; see `read_bytes` and `parse_yaml`."""
    return parse_yaml(read_bytes(path, YAML_BYTES), path)


@functools.cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)
