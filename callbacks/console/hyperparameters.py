"""Fills TensorBoard's HParams tab: the run's settings beside what it came to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from core.errors import UserError
from core.overrides import parse
from core.provenance import device_of, origin
from core.run_folder import flatten, read_overrides
from core.status import PROVENANCE

LEADING = (
    "model/placement",
    "model/init",
    "model/norm",
    "model/ffn",
    "model/num_layers",
    "model/dim",
    "optim/optimizer",
    "optim/lr",
)
"""Settings that most runs are compared by."""
FURTHER_METRICS = ("train/loss", "train/tokens_per_second")


class Hyperparameters(L.Callback):
    """Writes the hyperparameters of module and data, flattened (`model/dim`), when training starts.

    The tab shows the first few of them: what the command line overrode comes first, then placement, init, norm, size
    and rate. Behind them stands where the run comes from (`provenance/commit`, `provenance/host`). Lightning's own way
    writes them only together with a made-up first value of the metric, which spoils its curve.

    Args:
        metric: the scalar that the tab shows beside them, before training loss and speed; its last value counts.
        run_dir: the run's folder, whose overrides.yaml says what was overridden; None: nothing comes first for that.
    """

    def __init__(self, metric: str = "val/loss", run_dir: str | None = None) -> None:
        self.metric, self.run_dir = metric, run_dir

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A Trainer of one's own may have DataLoaders instead.
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        of_data: Any = getattr(datamodule, "hparams", {})
        settings = flatten({**pl_module.hparams, "data": dict(of_data)}, "/")
        made_by = origin(device_of(trainer), getattr(datamodule, "stream_identity", {}).get("corpus"))
        settings |= {f"{PROVENANCE}/{name}": value for name, value in made_by.items()}
        plain = {key: v if isinstance(v, bool | int | float | str) else str(v) for key, v in settings.items()}
        ordered = dict.fromkeys([*(name for name in (*self._overridden(), *LEADING) if name in plain), *plain])
        metrics = dict.fromkeys((self.metric, *FURTHER_METRICS), 0.0)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                for summary in hparams({name: plain[name] for name in ordered}, metrics):
                    logger.experiment.file_writer.add_summary(summary)

    def _overridden(self) -> Sequence[str]:
        """Return the fields on the run's command line, as the tab calls them."""
        if self.run_dir is None:
            return ()
        try:
            overrides = read_overrides(Path(self.run_dir))
        except UserError:  # of a Trainer of one's own there are none
            return ()
        return [override.key_or_group.replace(".", "/") for override in parse(overrides)]
