"""Holds the settings in a dataset's folder against where they may lead: `datasets` follows them anywhere."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from core.errors import InvalidValue
from core.untrusted import YAML_BYTES, Untrusted, parse_yaml, read_bytes

CARD, PLAIN = "README.md", ".huggingface.yaml"
"""The files that `datasets` takes settings from: of the first what stands before its text."""
FRONT = re.compile(r"^\s*---(?:\r\n|\r|\n)([\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)")  # as huggingface_hub has it
FILES = ("data_files", "data_dir")


def check_card(folder: Path, where: str) -> None:
    """Refuse a folder whose own settings send the reader to an address, or to files outside of it.

    Links are followed, as those are in which the hub's cache keeps a dataset.

    Args:
        folder: of a dataset.
        where: the input, for the message.

    Raises:
        InvalidValue: they do, or cannot be read; says which.
    """
    for path in (folder / CARD, folder / PLAIN):
        if not os.path.lexists(path):
            continue
        try:
            settings = _settings(path)
        except Untrusted as error:
            raise InvalidValue("input", where, str(error)) from error
        for place in _places(settings):
            said = f"{path} names {place[:200]!r}"
            if "://" in place or "::" in place:
                raise InvalidValue("input", where, f"{said}, an address, which is fetched only as an input of its own")
            if ".." in Path(place).parts or not (folder.absolute() / place).is_relative_to(folder.absolute()):
                raise InvalidValue("input", where, f"{said}, which leads out of the dataset's folder")


def _settings(path: Path) -> Any:
    text = read_bytes(path, YAML_BYTES).decode("utf-8", "replace")
    front = FRONT.match(text)
    return parse_yaml(text if path.name == PLAIN else front[1] if front else "", path)


def _places(settings: Any, is_place: bool = False) -> Iterator[str]:
    """Yield every text below a setting of files, however it is nested."""
    if isinstance(settings, str):
        yield from [settings] if is_place else []
    elif isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from _places(value, is_place or key in FILES)
    elif isinstance(settings, list):
        for value in settings:
            yield from _places(value, is_place)
