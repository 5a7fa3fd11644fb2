"""Makes the objects that a composed config names with `_target_`, after holding each against its signature."""

from typing import Any

from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from core.errors import ConfigError, require
from core.options import check_arguments


def build(config: DictConfig, field: str, **filled_in: Any) -> Any:
    """The object that `config.FIELD` describes.

    Args:
        config: the whole composed config.
        field: dotted name of the node with the `_target_`.
        filled_in: arguments that the project passes itself; they replace those of the config.

    Raises:
        ConfigError: no such class, or an argument that it does not take.
    """
    node = _node(config, field)
    require(isinstance(node, DictConfig) and "_target_" in node, field, node, "a group with a _target_")
    try:
        target = get_class(node["_target_"])
    except Exception as error:  # whatever the import of somebody's class raises
        raise ConfigError(f"{field}._target_", node["_target_"], f"an importable class ({error})") from error
    given = instantiate(DictConfig({k: v for k, v in node.items() if k != "_target_"}), _convert_="all")
    arguments = {name: value for name, value in given.items() if not name.startswith("_")}
    check_arguments(field, target, {name: v for name, v in arguments.items() if name not in filled_in})
    try:
        return target(**{**arguments, **filled_in})
    except ConfigError:
        raise
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        # Lightning's misconfiguration errors and the like: the message says more than its traceback.
        raise ConfigError(field, arguments, str(error)) from error


def build_all(config: DictConfig, group: str) -> list[Any]:
    """Every entry of a group that is not null, in order: `callbacks.NAME=null` leaves one out."""
    return [build(config, f"{group}.{name}") for name, node in (config[group] or {}).items() if node is not None]


def _node(config: DictConfig, field: str) -> Any:
    node: Any = config
    for part in field.split("."):
        node = node[part]
    return node
