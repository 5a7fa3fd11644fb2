"""Makes the objects that a composed config names with `_target_`, after holding each against its signature."""

import pydoc
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from core.errors import ConfigError, InvalidValue, UserError, one_line, require
from core.moved import current_name, describe_move, with_current_names
from core.options import check_arguments
from core.overrides import shipped_entries
from core.paths import require_path

PATHS = {"root", "path", "cache_dir", "run_dir", "dirpath", "save_dir", "default_root_dir"}
NAMES = {"filename", "name", "version"}
"""Arguments, of whatever takes them, that are folders, and that become a part of a file's name."""


def build(config: DictConfig, field: str, **filled_in: Any) -> Any:
    """Return the object that `config.FIELD` describes.

    Args:
        config: the whole composed config.
        field: dotted name of the node with the `_target_`.
        filled_in: arguments that the project passes itself; they replace those of the config.

    Raises:
        ConfigError: no such class, or an argument that it does not take.
    """
    node = OmegaConf.select(config, field)
    require(isinstance(node, DictConfig) and "_target_" in node, field, node, "a group with a _target_")
    _say_moved(field, node["_target_"])
    target = import_target(f"{field}._target_", node["_target_"])
    # Resolved here: a reference further down does not find the rest of the configuration from a part of it.
    content = cast(dict[str, Any], with_current_names(OmegaConf.to_container(node, resolve=True)))
    given = _with_objects(field, {name: value for name, value in content.items() if name != "_target_"})
    arguments = {name: value for name, value in given.items() if not name.startswith("_")}
    for name, value in arguments.items():
        if name in PATHS or (name in NAMES and value):
            require_path(f"{field}.{name}", value, "the path of a folder" if name in PATHS else "a file's name")
    check_arguments(field, target, {**arguments, **filled_in})
    try:
        return target(**{**arguments, **filled_in})
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError, ImportError, MisconfigurationException) as error:
        # What Lightning and the like find wrong: the message says more than its traceback.
        message = one_line(error)
        name = _culprit(arguments, message)
        raise InvalidValue(f"{field}.{name}", node[name], message) from error


def build_module(config: DictConfig, data: Any) -> Any:
    """Return the LightningModule of `config.module`.

    Args:
        config: the whole composed config.
        data: has, as attributes, what the class says by `of_data` that it takes of the data rather than of the
            configuration; a class that says nothing takes vocab_size.

    Raises:
        ConfigError: as `build`, or the data are not of the module's kind.
    """
    return build(config, "module", **of_data(config, lambda name: getattr(data, name, None), type(data).__name__))


def of_data(config: DictConfig, find: Callable[[str], Any], where: str) -> dict[str, Any]:
    """Return the arguments of `config.module` that its data say.

    Args:
        config: the whole composed config.
        find: gives the value of one; None: there is none.
        where: what is searched, for the message.

    Raises:
        ConfigError: one is not there.
    """
    target = OmegaConf.select(config, "module._target_")
    names: tuple[str, ...] = getattr(import_target("module._target_", target), "of_data", ("vocab_size",))
    found = {name: find(name) for name in names}
    for name, value in found.items():
        require(value is not None, "module._target_", target, f"one that goes with the data: {where} has no {name}")
    return found


def _with_objects(field: str, content: dict[str, Any]) -> Any:
    """Return the arguments with what the `_target_`s among them describe.

    Raises:
        ConfigError: one cannot be made, and no error of this project says why.
    """
    arguments = DictConfig(content)
    try:
        return instantiate(arguments, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        message, _, name = one_line(error).partition(" full_key: ")
        if name and OmegaConf.select(arguments, name) is None:
            name = re.sub(r"(\d+)$", r"[\1]", name)  # of a list's entry Hydra leaves the brackets out
        value = OmegaConf.to_container(OmegaConf.select(arguments, name)) if name else content
        message = message.replace(", set env var HYDRA_FULL_ERROR=1 to see chained exception.", "").rstrip(".")
        raise InvalidValue(f"{field}.{name}" if name else field, value, message) from error


def build_all(config: DictConfig, group: str) -> list[Any]:
    """Return what every entry of a group describes, in order.

    An entry that is null is left out: `callbacks.NAME=null`. So is one of ours that has settings and nothing to be set:
    an experiment sets fields of a callback, which `callbacks=[monitors]` may not have.
    """
    entries = OmegaConf.select(config, group) or {}
    bare = {name for name, node in entries.items() if isinstance(node, DictConfig) and "_target_" not in node}
    unset = bare & shipped_entries(group) if bare else bare  # our files are read only where it matters
    chosen = [name for name, node in entries.items() if node is not None and name not in unset]
    return [build(config, f"{group}.{name}") for name in chosen]


def import_target(field: str, name: object) -> Callable[..., Any]:
    """Return what a `_target_` names, also by the name that it had in an earlier version.

    Raises:
        ConfigError: it cannot be imported, or called.
    """
    reason = ""
    try:
        target = pydoc.locate(current_name(str(name)))
    except pydoc.ErrorDuringImport as error:
        target, reason = None, f" ({error}{describe_move(error.value)})"
    if not callable(target):
        raise ConfigError(field, name, f"a class that can be imported, as package.module.Class{reason}")
    return target


def _say_moved(field: str, name: object) -> None:
    """Tell whoever composed the configuration the new name of a class that has moved; saved ones are rewritten before.

    One process of several says it.
    """
    new = current_name(str(name))
    if new != str(name) and not getattr(rank_zero_only, "rank", 0):
        print(f"{field}._target_={name} is now {new}", file=sys.stderr, flush=True)


def _culprit(arguments: Mapping[str, Any], message: str) -> str:
    """Return the argument whose name or value comes first in an error message; failing that, the target itself."""
    found = [
        (match.start(), name)
        for name, value in arguments.items()
        for word in (name, *(value if isinstance(value, dict) else [value]))
        if isinstance(word, str) and (match := re.search(rf"\b{re.escape(word)}\b", message))
    ]
    return min(found)[1] if found else "_target_"
