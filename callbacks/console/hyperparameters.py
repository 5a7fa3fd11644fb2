"""Fills TensorBoard's HParams tab, and what other loggers have like it: settings beside what a run came to."""

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
from core.task import task_of

LEADING = (
    "model/placement",
    "model/init",
    "optim/lr",
    "model/norm",
    "model/num_layers",
    "model/dim",
    "model/ffn",
    "optim/optimizer",
)
"""Settings that most runs are compared by; the tab shows the first five of one run's names, of whatever runs."""
OF_THE_FOLDER = ("run_dir", "ckpt_path")
"""What each run has its own of."""


class Hyperparameters(L.Callback):
    """Writes the hyperparameters of module and data, flattened (`model/dim`), when training starts.

    The tab sorts them by name, of one of its runs, and shows the first five: so placement, init, rate, norm and number
    of blocks stand there a second time under names that come first, `1 placement`, `2 init`. What the command line
    asked for does too, as `asked/optim/lr`. Behind all settings comes where the run is from (`provenance/commit`,
    `provenance/host`). Lightning's own way writes them only together with a made-up first value of the metric, which
    spoils its curve. Other loggers get the folder, what was asked for and where the run is from.

    Args:
        metric: the scalar that the tab shows beside them, before training loss and speed; its last value counts.
        run_dir: the run's folder, whose overrides.yaml says what was asked for; None: it is not told.
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
        first = {f"asked/{name}": settings.get(name, value) for name, value in self._asked().items()}
        leading = {f"{number} {name.split('/')[-1]}": settings.get(name) for number, name in enumerate(LEADING, 1)}
        first = {name: value for name, value in leading.items() if value is not None} | first
        plain = {key: v if isinstance(v, bool | int | float | str) else str(v) for key, v in (first | settings).items()}
        # The others have all settings by Lightning's own way.
        more = {name: v for name, v in plain.items() if name.startswith(("asked/", f"{PROVENANCE}/"))}
        more |= {"run_dir": str(Path(self.run_dir).absolute())} if self.run_dir is not None else {}
        metrics = dict.fromkeys((self.metric, "train/loss", f"train/{task_of(pl_module).counted}_per_second"), 0.0)
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(more)
            elif trainer.is_global_zero:
                for summary in hparams(plain, metrics):
                    logger.experiment.file_writer.add_summary(summary)

    def _asked(self) -> dict[str, Any]:
        """Return the fields and groups on the run's command line, as the tab calls them, with their values."""
        if self.run_dir is None:
            return {}
        try:
            overrides = parse(read_overrides(Path(self.run_dir)))
        except UserError:  # of a Trainer of one's own there are none
            return {}
        asked = {override.key_or_group.replace(".", "/"): override.value() for override in overrides}
        return {name: value for name, value in asked.items() if name not in OF_THE_FOLDER}
