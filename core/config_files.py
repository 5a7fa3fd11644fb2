"""Refuses what a configuration file, or `+FIELD=VALUE`, sets without any effect, and files that cannot be read."""

import difflib
import re
import traceback
from typing import Any

from omegaconf import DictConfig, OmegaConf

from core.errors import InvalidValue, UnknownField, UserError, one_line
from core.overrides import shipped_entries, top_level

HEADER = "# @package _global_"
"""The first line of a file that sets fields outside of its own group."""
WHOLE_FILES = ("experiment", "study_scale")
"""Groups of such files."""
SWITCHED_OFF = ("callbacks", "logger")
"""Groups whose entries `null` turns off."""


def require_effect(config: DictConfig) -> None:
    """Refuse fields that nothing reads: Hydra takes them from a file, or from `+FIELD=VALUE`, without a word.

    A field of one's own that others refer to, as `optim.lr: ${rate}` does to `rate`, has an effect.

    Args:
        config: composed of configs/train.yaml.

    Raises:
        ConfigError: names the field, and the one that may have been meant.
    """
    known = top_level("train")
    text: str | None = None
    for name in map(str, config):
        if name in known - set(WHOLE_FILES):
            continue
        text = OmegaConf.to_yaml(config, resolve=False) if text is None else text
        if name in WHOLE_FILES:
            reason = f"without '{HEADER}' as its first line, from its first byte on, nothing of that file has an effect"
            raise InvalidValue(name, _value(config, name), reason)
        if not re.search(rf"\$\{{[^}}]*(?<![\w]){re.escape(name)}(?!\w)", text):
            raise _unknown(name, _value(config, name), known)


def turned_off_in_vain(config: DictConfig) -> list[str]:
    """Return a line for each callback or logger that is null and has never been there, but for a letter or two."""
    found = []
    for group in SWITCHED_OFF:
        entries: Any = config.get(group) or {}
        empty = [str(name) for name in entries if entries[name] is None]
        names = shipped_entries(group) if empty else set()
        for name in (name for name in empty if name not in names):
            if close := difflib.get_close_matches(name, names, n=1, cutoff=0.8):
                found.append(f"{group}.{name}=null turns nothing off (did you mean {close[0]}?)")
    return found


def _value(config: DictConfig, name: str) -> Any:
    value: Any = OmegaConf.to_container(config, resolve=False)
    return {str(key): of_key for key, of_key in value.items()}[name]


def _unknown(name: str, value: Any, known: frozenset[str]) -> InvalidValue:
    if "." in name:
        group, _, rest = name.partition(".")
        return InvalidValue(name, value, f"a field of a group is set below it in a file: '{group}: {{{rest}: ...}}'")
    return UnknownField(name, value, known - {"hydra", "schema"})


def about_a_file_of_settings(error: BaseException) -> UserError | None:
    """Return what is wrong with a configuration file, where composing has failed at one; None: it has not.

    Hydra lets what goes wrong in a file pass as it is. Which one it was reading only its own frames know.
    """
    places = list(traceback.walk_tb(error.__traceback__))
    reading = [
        frame.f_locals["full_path"]
        for frame, _ in places
        if frame.f_code.co_filename.endswith("file_config_source.py") and "full_path" in frame.f_locals
    ]
    if reading:
        reason = "it is nested too deep, or holds itself" if isinstance(error, RecursionError) else one_line(error)
        return UserError(f"{reading[-1]} cannot be read as a configuration: {reason}")
    files = [frame.f_code.co_filename for frame, _ in places]
    if isinstance(error, RecursionError) and any(file.endswith("hydra/_internal/defaults_list.py") for file in files):
        return UserError("a configuration file is among its own defaults, or among those of what they name")
    of_hydra = isinstance(error, ValueError) and "hydra/_internal/" in files[-1]
    return UserError(one_line(error)) if of_hydra else None
