"""A run folder -> the model that was trained in it, for whoever uses it afterwards."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from core.build import build
from core.errors import ConfigError, require
from core.saved_config import load_config


@dataclass(frozen=True)
class OpenRun:
    """What a run left behind.

    Attributes:
        folder: the run's.
        config: what it ran with.
        module: its LightningModule, weights loaded, in eval mode.
        datamodule: its DataModule; nothing of the corpus is read yet.
        step: optimizer steps that the weights have seen.
    """

    folder: Path
    config: DictConfig
    module: Any
    datamodule: Any
    step: int


def open_run(folder: Path, checkpoint: str = "last", allow: str = "") -> OpenRun:
    """Load a run's model, on a GPU if there is one, in fp32.

    Args:
        folder: the run's.
        checkpoint: last, best, or the path of one.
        allow: classes of the user's own that its configuration names, separated by commas; no others are imported.

    Raises:
        ConfigError: no run, foreign code in it, no such checkpoint, or one that cannot be read as one of this run.
    """
    import torch

    from core.checkpoint import load

    config = load_config(folder, [name.strip() for name in allow.split(",")])
    named = checkpoint in ("last", "best")
    path = folder / f"checkpoints/{checkpoint}.ckpt" if named else Path(checkpoint)
    require(path.exists(), "checkpoint", checkpoint, f"last, best, or the path of a checkpoint; {path} is not there")
    # Of the module's own copy: a saved configuration has no references.
    config.module.model.compile = config.module.model.activation_checkpointing = False
    # The one it was trained with may not compute in fp32, or not be had here; all compute the same.
    OmegaConf.update(config, "module.model.moe.backend", "auto")
    try:
        content = load(path)
        vocab_size, step = content["hyper_parameters"]["vocab_size"], content["global_step"]
        weights = content["state_dict"]
    except Exception as error:  # truncated, no checkpoint at all, or one with code in it
        raise ConfigError("checkpoint", str(path), "a whole checkpoint; this file cannot be read as one") from error
    module = build(config, "module", vocab_size=vocab_size)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        module.configure_model()
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError("checkpoint", str(path), f"a checkpoint of the model that {folder} describes") from error
    return OpenRun(folder, config, module.eval(), build(config, "data"), step)
