"""A tiny LanguageModule under a Trainer, and what happens in its fit."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_modules.language_module import LanguageModule

Batch = dict[str, Tensor]


class Recorder(Logger):
    """Keeps what is logged, one dictionary a call."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.records: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.records.append(metrics)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def series(self, key: str) -> list[float]:
        return [record[key] for record in self.records if key in record]


def make_trainer(root: Path, **options: Any) -> L.Trainer:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(**{"accelerator": "cpu", "default_root_dir": root, "log_every_n_steps": 1, **quiet, **options})


def fit(root: Path, module: LanguageModule, *batches: Tensor, **options: Any) -> L.Trainer:
    """Train on the batches, in order, without validation."""
    trainer = make_trainer(root, limit_val_batches=0, **options)
    trainer.fit(module, loader(*batches), loader(batches[0]))
    return trainer


def loader(*batches: Tensor) -> DataLoader[Batch]:
    return DataLoader([{"tokens": batch} for batch in batches], batch_size=None)  # type: ignore[arg-type]
