"""Composes the configuration of a run from overrides, without starting it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from core.accelerator import register_resolver
from core.config_files import require_effect
from core.errors import InvalidValue, require
from core.overrides import CONFIGS, given, with_names_of_today
from core.paths import require_path
from lightning_modules.config import ModelConfig, OptimConfig, writable_schema


def register_schemas() -> None:
    """Give Hydra the typed `model` and `optim` groups, which configs/train.yaml starts from, and our resolver."""
    register_resolver()
    store = ConfigStore.instance()
    for name, schema in (("model", ModelConfig), ("optim", OptimConfig)):
        node = writable_schema(schema)
        for child in node.values():
            if OmegaConf.get_type(child) is dict:
                OmegaConf.set_struct(child, False)  # options: what they may hold is known where they are used
        store.store(group="schema", name=name, node=node, package=name)


def compose_run(overrides: Sequence[str]) -> DictConfig:
    """Return the configuration that train.py composes of the same overrides.

    Raises:
        HydraException, OmegaConfBaseException, ConfigError: an override that does not fit.
    """
    register_schemas()
    arguments = with_names_of_today(overrides)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", arguments)
    require_effect(config)
    inherit_model(config, arguments)
    return config


def inherit_model(config: DictConfig, overrides: Sequence[str], checkpoint: Path | None = None) -> list[str]:
    """Give `model` the architecture of what `init_from` names, in the fields that nobody has set.

    A field is set by an override, by the file of the chosen experiment, or by whatever else gives it another value than
    a run has by default. It stays, and has to fit: warm_start holds it against the source.

    Args:
        config: composed, of these overrides.
        overrides: of the command line.
        checkpoint: of the run itself, where it is resumed: it then says what the model is, and init_from may be gone.

    Returns:
        The fields that were given another value, as NAME=VALUE.

    Raises:
        ConfigError: `init_from` is no source of weights, or its model one that is not had here.
    """
    source = config.init_from
    if source is None:
        return []
    what = "the path of weights to start from"
    require(isinstance(source, str), "init_from", source, what)
    require_path("init_from", source, what)
    if not isinstance(config.get("model"), DictConfig):  # of a LightningModule of the user's own
        return []
    from core.saved_config import IMPORTABLE  # these two take torch
    from lightning_modules.warm_start import model_of

    experiment = given("experiment", overrides)
    path = CONFIGS / f"experiment/{experiment}.yaml"
    of_experiment = _plain(OmegaConf.load(path)) if path.is_file() else {}
    by_default = OmegaConf.merge(writable_schema(ModelConfig), OmegaConf.load(CONFIGS / "model/dense.yaml"))
    theirs = model_of(checkpoint or Path(source)) or {}
    taken = []
    for name, value in theirs.items():
        field, before = f"model.{name}", _plain(OmegaConf.select(config.model, name))
        asked = given(field, overrides) is not None or _at(of_experiment, field) is not None
        of = name.removesuffix("_options")  # options go with what they are of
        apart = name != of and config.model[of] != theirs[of]
        if asked or apart or before == value or before != _plain(OmegaConf.select(by_default, name)):
            continue
        if name in IMPORTABLE and "." in str(value):  # it may come from a stranger
            raise InvalidValue(field, value, f"{source} names code that is not this project's; {field}={value} runs it")
        OmegaConf.update(config, field, value, merge=False)
        taken.append(f"{name}={value}")
    return taken


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node) if isinstance(node, DictConfig) else node


def _at(node: Any, name: str) -> Any:
    for part in name.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node
