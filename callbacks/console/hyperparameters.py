"""Fills TensorBoard's HParams tab: the run's settings beside its validation loss."""

from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from core.run_folder import flatten


class Hyperparameters(L.Callback):
    """Writes the hyperparameters of module and data, flattened (`model/dim`), when training starts.

    Lightning's own way writes them only together with a made-up first value of the metric, which spoils its curve.

    Args:
        metric: the scalar that the tab shows beside them.
    """

    def __init__(self, metric: str = "val/loss") -> None:
        self.metric = metric

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A Trainer of one's own may have DataLoaders instead.
        of_data: Any = getattr(trainer.datamodule, "hparams", {})  # type: ignore[attr-defined]
        settings = flatten({**pl_module.hparams, "data": dict(of_data)}, "/")
        plain = {key: v if isinstance(v, bool | int | float | str) else str(v) for key, v in settings.items()}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                for summary in hparams(plain, {self.metric: 0.0}):
                    logger.experiment.file_writer.add_summary(summary)
