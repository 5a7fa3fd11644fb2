"""The configuration in a run's folder, which may come from anywhere: it names classes, so reading it could run code."""

import importlib
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO, Precision
from lightning.pytorch.strategies import Strategy
from omegaconf import DictConfig, ListConfig, OmegaConf

from core.errors import InvalidValue, UserError, one_line, require
from core.moved import with_current_names
from core.untrusted import YAML_BYTES, Untrusted, parse_yaml, read_bytes

PACKAGES = ("callbacks", "core", "datamodules", "lightning_modules", "lightning")
_LIGHTNING = "lightning.pytorch"
KINDS = {
    "module": ((L.LightningModule,), ("lightning_modules",)),
    "data": ((L.LightningDataModule,), ("datamodules",)),
    "trainer": (
        (L.Trainer, Strategy, CheckpointIO, Precision),
        (
            "lightning_modules",
            "core.checkpoint",
            f"{_LIGHTNING}.strategies",
            f"{_LIGHTNING}.plugins",
            "lightning.fabric.plugins",
        ),
    ),
    "callbacks": ((L.Callback,), ("callbacks", f"{_LIGHTNING}.callbacks")),
    "logger": ((Logger,), ("core.tensorboard", f"{_LIGHTNING}.loggers")),
}
"""The classes that each group of a run is made of, and the modules that they may come from: no others are imported.

torch.hub.load and its like are never needed. A logger in another group would be made by whoever opens the run, and some
open files or connections as they are made; a DataModule of Lightning's examples downloads.
"""
TRAINERS = ("lightning.Trainer", f"{_LIGHTNING}.Trainer", f"{_LIGHTNING}.trainer.Trainer")
ADDRESS = "://"
"""This makes an address elsewhere of a corpus' path (datamodules/remote.py)."""


OFFERED = 12
"""At most so many names of foreign code are offered to be allowed: more than a run has pieces of one's own."""
IMPORTABLE = ("placement", "norm", "init", "schedule", "optimizer")
"""Fields that hold a name of this project's, or the import path of a class or function of the user's own."""


def load_config(run: Path, allow: Collection[str] = ()) -> DictConfig:
    """Return the configuration with which a run was last started, its own or a resumed one's.

    Classes that have moved since are in it under their names of today.

    Args:
        run: the run's folder.
        allow: targets from outside this project, lightning and torch that the user vouches for.

    Raises:
        UserError: it is not there, or cannot be read.
        ConfigError: a class of it is not allowed.
    """
    found = sorted(run.glob("config*.yaml"), key=lambda path: path.stat().st_mtime)
    require(bool(found), "RUN", str(run), "the folder of a run, with its config.yaml")
    config = read_config(found[-1])
    require(isinstance(config, DictConfig), "RUN", str(run), f"a configuration in {found[-1].name}")
    config = OmegaConf.create(with_current_names(OmegaConf.to_container(config, resolve=False)))
    refuse_foreign_code(config, allow)
    return config


def read_config(path: Path) -> Any:
    """Return what OmegaConf makes of a file, within core/untrusted.py's bounds: its size, values, depth; no aliases.

    A run saves its configuration without references. They are refused before OmegaConf, which takes long to parse many,
    and again in what OmegaConf has made of the text.

    Raises:
        UserError: it is not there, or cannot be read.
        ConfigError: it holds a reference, behind which code could hide: names the field.
    """
    try:
        text = read_bytes(path, YAML_BYTES)
        content = parse_yaml(text, path)
    except Untrusted as error:
        raise UserError(f"{path} cannot be read as a configuration: {one_line(error)}") from error
    _refuse_references(content)
    try:
        config = OmegaConf.create(text.decode())
    except Exception as error:  # of YAML's and OmegaConf's many kinds
        raise UserError(f"{path} cannot be read as a configuration: {one_line(error)}") from error
    # What is used is what has to be looked at: OmegaConf reads YAML by rules of its own, and makes lists of tuples.
    _refuse_references(OmegaConf.to_container(config, resolve=False))
    return config


def _refuse_references(content: Any) -> None:
    """Raise ConfigError at the first text in which OmegaConf would see a reference."""
    for field, value in _leaves(content):
        if isinstance(value, str) and "${" in value:
            short = value if len(value) <= 100 else f"{value[:100]}…"
            reason = "a saved configuration holds no references; this one was not saved by a run"
            raise InvalidValue(field[-200:], short, reason)


def refuse_foreign_values(values: dict[str, Any], allow: Collection[str] = ()) -> None:
    """Hold the hyperparameters of a checkpoint, as plain values, as those of a saved configuration are held.

    Raises:
        ConfigError: one is a reference, or names code that is not allowed.
    """
    _refuse_references(values)
    _refuse_foreign_code(values, allow)


def refuse_foreign_code(config: DictConfig, allow: Collection[str] = ()) -> None:
    """Hold every class and function that a saved configuration names against what may be made of it, and make none.

    Raises:
        ConfigError: names the field of the first that is neither one of KINDS, nor allowed, and how to allow all that
            are not.
    """
    _refuse_foreign_code(OmegaConf.to_container(config, resolve=False), allow)


def _refuse_foreign_code(content: Any, allow: Collection[str]) -> None:
    foreign: dict[str, Any] = {}
    for field, value in _leaves(content):
        if value not in allow and _names_foreign_code(field, value):
            foreign[field] = value
    if not foreign:
        return
    names = list(dict.fromkeys(str(value) for value in foreign.values()))[:OFFERED]
    reason = f"the saved configuration names code that is not this project's; allow={','.join(names)} runs it"
    raise InvalidValue(next(iter(foreign)), next(iter(foreign.values())), reason)


def texts(content: Any) -> Iterator[str]:
    """Yield every text in a configuration, as plain values: what its author names, among them."""
    return (value for _, value in _leaves(content) if isinstance(value, str))


def _names_foreign_code(field: str, value: Any) -> bool:
    """Return whether a value of the configuration is the name of code that is neither this project's nor allowed."""
    key = field.rpartition(".")[2]
    if key == "_target_":
        return not _is_ours(field, value)
    return key in IMPORTABLE and isinstance(value, str) and "." in value


def _leaves(node: Any, field: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of everything that is no group and no list; `_target_` of anything."""
    if not isinstance(node, dict | list):
        yield field, node
        return
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        name = f"{field}.{key}" if field else str(key)
        if key == "_target_" and not isinstance(value, str):
            yield name, value
        yield from _leaves(value, name)


def _is_ours(field: str, value: Any) -> bool:
    group = field.partition(".")[0]
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", value) or group not in KINDS:
        return False
    if value in TRAINERS:
        return field == "trainer._target_"
    kinds, homes = KINDS[group]
    module, _, name = value.rpartition(".")
    if not any(f"{module}.".startswith(f"{home}.") for home in homes):
        return False
    try:
        target = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return False
    # A module may have imported it: that class has to be from one of the packages all the same.
    if not isinstance(target, type) or target.__module__.partition(".")[0] not in PACKAGES:
        return False
    return issubclass(target, kinds)


def refuse_addresses(data: DictConfig, allow: Collection[str] = ()) -> None:
    """Refuse to ask elsewhere for the corpus of a run that may come from a stranger, before its user has said so.

    Raises:
        ConfigError: `path`, or one of `paths`, is an address that is not allowed.
    """
    paths = data.get("paths")
    several = paths if isinstance(paths, ListConfig) else [paths]
    for field, value in (("path", data.get("path")), *(("paths", path) for path in several)):
        if isinstance(value, str) and ADDRESS in value and value not in allow:
            reason = "the saved configuration names an address, of which nothing is fetched by itself"
            reason += f"; allow={value} asks there"
            raise InvalidValue(f"data.{field}", value, reason)


def refuse_hub(datamodule: Any, allow: Collection[str] = ()) -> None:
    """Refuse to ask the Hugging Face hub for what the data of such a run are made of, before its user has said so.

    Args:
        datamodule: not yet prepared. Where it has `fetched_from_hub`, that is what it would ask for, by field.
        allow: names of datasets, as the run has them, and of tokenizers, as hf:NAME.

    Raises:
        ConfigError: one is not allowed; names the first, and how to allow all that are not.
    """
    wanted: dict[str, str] = getattr(datamodule, "fetched_from_hub", {})
    names = {field: value for field, value in wanted.items() if value not in allow}
    if names:
        field, value = next(iter(names.items()))
        reason = "the saved configuration names it on the Hugging Face hub, of which nothing is fetched by itself"
        raise InvalidValue(field, value, f"{reason}; allow={','.join(names.values())} asks there")
