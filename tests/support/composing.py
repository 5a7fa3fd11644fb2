"""The configuration that a command line composes."""

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from lightning_modules.composing import register_schemas
from tests.support.runs import ROOT


def composed(*overrides: str) -> DictConfig:
    register_schemas()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("train", list(overrides))
