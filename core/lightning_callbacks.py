"""Callbacks of Lightning's that assume what a run here is not: several epochs, or settings that may change."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Checkpoint,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ProgressBar,
    StochasticWeightAveraging,
)
from omegaconf import DictConfig

from core.errors import ConfigError, InvalidValue, require

REFUSED: dict[type[L.Callback], str] = {
    LearningRateFinder: "it would train at another rate than optim.lr says; sweep that instead: -m optim.lr=1e-3,3e-3",
    BatchSizeFinder: "it would train on other batches than data.batch_size says; micro_batch_size is how many of their "
    "sequences a device takes at once, and changes no result",
    StochasticWeightAveraging: "it averages from epoch to epoch, and a run is a single epoch of trainer.max_steps; "
    "lightning.pytorch.callbacks.EMAWeightAveraging and WeightAveraging go by steps",
}


def without_stand_ins(settings: Mapping[str, Any], callbacks: Collection[L.Callback]) -> dict[str, bool]:
    """Return the Trainer's switches that are to be off, as no callback was chosen for what they stand for.

    Lightning would put one of its own in the place: a bar over an epoch without an end, a checkpoint beside the curves.

    Args:
        settings: of the Trainer, by name; a switch that they do not turn on is left alone.
        callbacks: which the Trainer is given.
    """
    kinds = {"enable_checkpointing": Checkpoint, "enable_progress_bar": ProgressBar}
    return {
        switch: False
        for switch, kind in kinds.items()
        if settings.get(switch) is True and not any(isinstance(callback, kind) for callback in callbacks)
    }


def check_callbacks(trainer: L.Trainer, config: DictConfig | None = None, passes: int = 1) -> None:
    """Refuse callbacks under which a run would be another one than its configuration says, before it does anything.

    Args:
        trainer: with its callbacks.
        config: the composed configuration, for the name of the field; None: a Trainer of one's own.
        passes: into how many forward passes `core.parallel.apply_micro_batching` will split each one.

    Raises:
        ConfigError: names the callback, and what does the same here.
    """
    # By train.py a run is a single epoch; under a Trainer of one's own, where the data have no end and it no epochs.
    endless = config is not None or getattr(getattr(trainer, "datamodule", None), "endless", False)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        field = field_of(callback, config)
        for kind, reason in REFUSED.items():
            if isinstance(callback, kind) and (trainer.max_epochs == -1 or kind is not StochasticWeightAveraging):
                raise InvalidValue(f"{field}._target_" if config else field, type(callback).__name__, reason)
        if isinstance(callback, GradientAccumulationScheduler) and trainer.max_epochs == -1 and endless:
            _check_accumulation(callback, trainer, f"{field}.scheduling", passes)


def _check_accumulation(callback: GradientAccumulationScheduler, trainer: L.Trainer, field: str, passes: int) -> None:
    own, batches = trainer.accumulate_grad_batches * passes, callback.get_accumulate_grad_batches(0)
    single = own == 1
    valid = "no such callback beside trainer.accumulate_grad_batches or micro_batch_size, which make a step of "
    require(single, field, callback.scheduling, f"{valid}{own} batches already")
    require(set(callback.scheduling) == {0}, field, callback.scheduling, "{0: BATCHES}: a run is a single epoch")
    every = trainer.val_check_interval
    if isinstance(every, int) and every % batches:
        valid = f"an integer, a multiple of {batches}, by {field}: a step is validated and saved whole"
        raise ConfigError("trainer.val_check_interval", every, valid)


def field_of(callback: L.Callback, config: DictConfig | None) -> str:
    """Return the name under which the configuration has the callback; `callbacks` where it has none."""
    given = (config.get("callbacks") if config is not None else None) or {}
    nodes: dict[Any, Any] = {name: node for name, node in given.items() if node is not None}
    names = [n for n, node in nodes.items() if Path(str(node.get("_target_"))).suffix == f".{type(callback).__name__}"]
    return f"callbacks.{names[0]}" if names else "callbacks"
