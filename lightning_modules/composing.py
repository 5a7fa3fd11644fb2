"""Composes the configuration of a run from overrides, without starting it."""

from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from core.accelerator import register_resolver
from core.overrides import CONFIGS, with_names_of_today
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
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", with_names_of_today(overrides))
