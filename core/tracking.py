"""Lightning's loggers for services that track experiments, told which run is which: Weights & Biases, and MLflow."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from core import compat


def label_of(run_dir: Path) -> str:
    """Return what a run is called beside others: the last two parts of its folder, EXPERIMENT/TIME by default."""
    return "/".join(run_dir.absolute().parts[-2:])


class WeightsAndBiases(WandbLogger):
    """Calls the run at Weights & Biases by its folder, and goes on in the same one when it is resumed there.

    `epoch` is left out, which Lightning adds to every step's metrics: the stream is a single one, number 0.

    Args:
        save_dir: the run's folder.
        name: null: see label_of.
        id: of a run to go on with; null: that of the folder's last one, if it has one, or else a new one.
        options: as in Lightning's logger; what that does not know goes to wandb.init.
    """

    def __init__(self, save_dir: str | Path, name: str | None = None, id: str | None = None, **options: Any) -> None:
        id = id or last_run(Path(save_dir))
        if id is not None and not options.get("offline"):  # wandb warns that it resumes nothing offline; the id is kept
            options.setdefault("resume", "allow")
        super().__init__(save_dir=save_dir, name=name or label_of(Path(save_dir)), id=id, **options)
        compat.leave_out_deprecated_settings(self)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send scalars at a step, as Lightning's logger does."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


def last_run(run_dir: Path) -> str | None:
    """Return the id of the last run at Weights & Biases that was logged from this folder, by wandb's own files."""
    names = (path.name for path in run_dir.glob("wandb/*"))
    found = [match.groups() for name in names if (match := re.fullmatch(r"(?:offline-)?run-(\d+_\d+)-([\w-]+)", name))]
    return max(found)[1] if found else None  # by their time


class MLflow(MLFlowLogger):
    """Calls the run at MLflow by its folder. A resumed run is a second one of that name: MLflow lets no setting change.

    `epoch` is left out as in WeightsAndBiases.

    Args:
        run_dir: the run's folder.
        run_name: null: see label_of.
        tracking_uri: of a server, or a database; null: as MLflow's own variables say.
        options: as in Lightning's logger.
    """

    def __init__(
        self, run_dir: str | Path, run_name: str | None = None, tracking_uri: str | None = None, **options: Any
    ) -> None:
        super().__init__(run_name=run_name or label_of(Path(run_dir)), tracking_uri=tracking_uri, **options)
        self.uri = tracking_uri or ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send scalars at a step, as Lightning's logger does."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """End the run at MLflow, and say how its page is opened where the database is a file."""
        super().finalize(status)
        if self.uri.startswith("sqlite:"):
            print(f"Curves in MLflow: {shlex.join(['mlflow', 'ui', '--backend-store-uri', self.uri])}")
