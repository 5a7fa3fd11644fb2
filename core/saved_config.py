"""The configuration in a run's folder, which may come from anywhere: it names classes, so reading it could run code."""

import argparse
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO, Precision
from lightning.pytorch.strategies import Strategy
from omegaconf import DictConfig, OmegaConf

from core.build import locate
from core.errors import Refused, UserError, one_line, require
from core.untrusted import YAML_BYTES, check_yaml, read_bytes

OWN = ("callbacks", "core", "datamodules", "lightning_modules")
PACKAGES = (*OWN, "lightning", "torch")
KINDS = {
    "module": ((L.LightningModule,), OWN),
    "data": ((L.LightningDataModule,), OWN),
    "trainer": ((L.Trainer, Strategy, CheckpointIO, Precision), PACKAGES),
    "callbacks": ((L.Callback,), PACKAGES),
    "logger": ((Logger,), PACKAGES),
}
"""By group, the classes that a run is made of there, and the packages that they may come from.

torch.hub.load and its like are in these packages too. A logger in another group would be made by whoever opens the run,
and some open files or connections as they are made; a DataModule of Lightning's examples downloads.
"""


def load_config(run: Path, allow: Collection[str] = ()) -> DictConfig:
    """The configuration with which a run was last started, its own or a resumed one's.

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
    assert isinstance(config, DictConfig)
    refuse_foreign_code(config, allow)
    return config


def read_config(path: Path) -> Any:
    """What OmegaConf makes of a file, within the bounds of core/untrusted.py: its size, values, depth; no aliases.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    try:
        text = read_bytes(path, YAML_BYTES)
        check_yaml(text, path)
        return OmegaConf.create(text.decode())
    except Exception as error:  # of YAML's, OmegaConf's and the file system's many kinds
        raise UserError(f"{path} cannot be read as a configuration: {one_line(error)}") from error


def refuse_foreign_code(config: DictConfig, allow: Collection[str] = ()) -> None:
    """Hold every class that a saved configuration names against what may be made of it, and make none.

    Raises:
        ConfigError: names the field of the first that is neither one of KINDS, nor allowed; or of a
            reference, behind which one could hide: a run saves its configuration without any.
    """
    for field, value in _leaves(OmegaConf.to_container(config, resolve=False)):
        if isinstance(value, str) and "${" in value:
            raise Refused(field, value, "a saved configuration holds no references; this one was not saved by a run")
        if field.rpartition(".")[2] == "_target_" and value not in allow and not _is_ours(field, value):
            way = f"--allow {value} runs it (or allow={value}, of a tool that takes FIELD=VALUE)"
            reason = f"the saved configuration names code that is not this project's; {way}"
            raise Refused(field, value, reason)


def add_allow_option(parser: argparse.ArgumentParser) -> None:
    """--allow CLASS, for `load_config`."""
    text = "a class of your own that the run's saved configuration names, as my_file.MyCallback; several: give it again"
    parser.add_argument("--allow", action="append", default=[], metavar="CLASS", help=text)


def _leaves(node: Any, field: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything that is no group and no list; `_target_` of anything."""
    if not isinstance(node, dict | list):
        yield field, node
        return
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        name = f"{field}.{key}" if field else str(key)
        if key == "_target_" and not isinstance(value, str):
            yield name, value
        yield from _leaves(value, name)


def _is_ours(field: str, value: Any) -> bool:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", value):
        return False
    kinds, packages = KINDS.get(field.partition(".")[0], ((), ()))
    if value.partition(".")[0] not in packages:  # importing it would run it
        return False
    target = locate(field, value)
    if not isinstance(target, type) or target.__module__.partition(".")[0] not in packages:
        return False
    return issubclass(target, kinds)
