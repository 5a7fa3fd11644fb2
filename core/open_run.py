"""A run folder -> the model that was trained in it, for whoever uses it afterwards."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from core.build import build, of_data
from core.checkpoint_path import checkpoint_path
from core.errors import ConfigError, one_line, require
from core.saved_config import load_config, refuse_addresses, refuse_hub

WRITTEN = {"root": "data", "cache_dir": "data/cache"}
IMPORTED = "datamodules.tokenizer_only.TokenizerOnly"
"""The DataModule of a run that tools.import made: its tokenizer lies in the run's folder, wherever that is by now."""
CACHE_GB = 50
"""The defaults of configs/data: where a run writes unless its user says otherwise, and how much."""


@dataclass(frozen=True)
class OpenRun:
    """A run that is over or stopped, opened for use.

    Attributes:
        folder: the run's.
        config: what it ran with.
        module: its LightningModule, weights loaded, in eval mode.
        datamodule: its DataModule; nothing of the corpus is read yet.
        step: optimizer steps that the weights have seen.
        checkpoint: where the weights come from, with what else it holds: core.checkpoint.load.
        data_identity: the `stream_identity` of the data that the weights were trained on; empty: not known.
    """

    folder: Path
    config: DictConfig
    module: Any
    datamodule: Any
    step: int
    checkpoint: Path
    data_identity: dict[str, Any] = field(default_factory=dict)


def open_run(folder: Path, checkpoint: str = "last", allow: Collection[str] = (), device: str | None = None) -> OpenRun:
    """Load a run's model in fp32.

    Args:
        folder: the run's.
        checkpoint: last, best, or the path of one.
        allow: classes of the user's own, addresses of corpora, and names on the Hugging Face hub, that its
            configuration names; no others are imported, or asked.
        device: where to; None: on a GPU if there is one.

    Raises:
        ConfigError: no run, foreign code in it, no such checkpoint, or one that cannot be read as one of this run.
    """
    import torch

    from core.checkpoint import load
    from core.checkpoint_values import data_states

    config = load_config(folder, allow)
    path = checkpoint_path(folder, checkpoint)
    require(path.exists(), "checkpoint", checkpoint, f"last, best, or the path of a checkpoint; {path} is not there")
    module_config = config.get("module")
    known = isinstance(module_config, DictConfig) and isinstance(module_config.get("model"), DictConfig)
    require(known, "RUN", str(folder), "a configuration with a module.model")
    if isinstance(config.get("data"), DictConfig) and config.data.get("_target_") == IMPORTED:
        config.data.path = str(folder)
    # Of the module's own copy: a saved configuration has no references.
    config.module.model.compile = config.module.model.activation_checkpointing = False
    # The one it was trained with may not compute in fp32, or not be had here; all compute the same.
    OmegaConf.update(config, "module.model.moe.backend", "auto")
    try:
        content = load(path)
        saved, step, weights = dict(content["hyper_parameters"]), content["global_step"], content["state_dict"]
        identity = dict(next(iter(data_states(content).values()), {}).get("stream_identity", {}))
    except Exception as error:  # truncated, no checkpoint at all, or one with code in it
        valid = f"a whole checkpoint; this file cannot be read as one ({one_line(error)})"
        raise ConfigError("checkpoint", str(path), valid) from error
    described = f"a checkpoint of the model that {folder} describes"
    # Before anything is made of the configuration, which may describe any size: a block has weights of its own.
    layers = config.module.model.get("num_layers")
    require(type(layers) is int and layers <= len(weights), "checkpoint", str(path), described)
    module = build(config, "module", **of_data(config, saved.get, path.name))
    there = sum(weight.numel() for weight in weights.values())
    require(module.num_parameters[0] <= there, "checkpoint", str(path), described)
    with torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")):
        module.configure_model()
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError("checkpoint", str(path), described) from error
    return OpenRun(folder, config, module.eval(), open_data(config, allow), step, path, identity)


def open_language_run(folder: Path, checkpoint: str = "last", allow: Collection[str] = ()) -> OpenRun:
    """Load a run as `open_run` does, of a model that predicts the next token of a text.

    Raises:
        ConfigError: as `open_run`; or the run is of another kind.
    """
    run = open_run(folder, checkpoint, allow)
    require(
        run.module.task.predicts_next,
        "RUN",
        str(folder),
        "a run whose model predicts the next token: this one's does not",
    )
    return run


def open_data(config: DictConfig, allow: Collection[str] = ()) -> Any:
    """Return the DataModule of a saved configuration, which writes nowhere but where a new run does by itself.

    A corpus that is there already is read wherever the configuration says. What has to be written first (the standard
    library's corpus, shards from elsewhere) goes into the working folder's `data`.

    Args:
        config: the whole configuration.
        allow: addresses of corpora, and names on the Hugging Face hub, that the user vouches for.

    Raises:
        ConfigError: it cannot be made, or lies at an address, or on the hub, that is not allowed.
    """
    data = config.get("data")
    require(isinstance(data, DictConfig), "data", data, "a group with a _target_")
    assert isinstance(data, DictConfig)
    refuse_addresses(data, allow)
    if "cache_dir" in data:
        data.cache_dir = WRITTEN["cache_dir"]
        if isinstance(data.get("cache_gb"), int | float):
            data.cache_gb = min(data.cache_gb, CACHE_GB)
    datamodule = build(config, "data")
    if "root" in data and data.root != WRITTEN["root"]:
        corpus = getattr(datamodule, "folder", None)
        if corpus is None or not (corpus / "index.json").is_file():
            data.root = WRITTEN["root"]
            datamodule = build(config, "data")
        else:
            datamodule.tidies = False
    refuse_hub(datamodule, allow)
    return datamodule
