"""Lightning's loggers for services that track experiments, told which run is which: Weights & Biases, MLflow, Comet."""

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CometLogger, MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from core import compat
from core.errors import UserError, one_line
from core.loggers import without_epoch
from core.printable import printable

START_ONLINE = "COMET_START_ONLINE"
"""Comet's variable; what Lightning passes on in its place does something else."""
NO_REPORTS = "COMET_ERROR_TRACKING_ENABLE"
"""Comet's variable for telling its makers of errors, which it does offline, too; read when it is imported."""
NOTHING_BESIDE: dict[str, Any] = {
    **dict.fromkeys(("log_code", "log_graph", "log_git_metadata", "log_git_patch", "log_env_details"), False),
    "auto_output_logging": False,
    "display_summary_level": 0,
}
"""Of Comet's settings."""


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
        super().log_metrics(without_epoch(metrics), step)


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
        super().log_metrics(without_epoch(metrics), step)

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """End the run at MLflow, and say how its page is opened where the database is a file."""
        super().finalize(status)
        if self.uri.startswith("sqlite:"):
            command = shlex.join(["mlflow", "ui", "--backend-store-uri", self.uri])
            print(f"Curves in MLflow: {printable(command, limit=None)}")


class Comet(CometLogger):
    """Calls the run at Comet by its folder, and ends it there with the training.

    Lightning's own `online=False` switches everything off, and leaves the end to that of the process: the next run of a
    sweep would be logged into this one. A resumed run is a second one of that name, and `epoch` is left out as in
    WeightsAndBiases. Source code, packages and git's state are not sent: RUN/provenance.json has what a run needs of
    them.

    Args:
        run_dir: the run's folder; what is kept here lies in its folder `comet`, as a zip for `comet upload`.
        name: null: see label_of.
        offline: whether everything is kept here, and nothing is sent.
        options: as in Lightning's logger.

    Raises:
        UserError: there is no key, and it is not offline.
    """

    def __init__(self, run_dir: str | Path, name: str | None = None, offline: bool = False, **options: Any) -> None:
        folder = Path(run_dir) / "comet"
        if offline:
            folder.mkdir(parents=True, exist_ok=True)  # or it takes another one
        os.environ[START_ONLINE] = str(not offline)
        os.environ.setdefault(NO_REPORTS, "false")
        try:
            super().__init__(
                name=name or label_of(Path(run_dir)), offline_directory=str(folder), **NOTHING_BESIDE, **options
            )
        except ValueError as error:  # without a key
            help = "COMET_API_KEY has yours, or logger.comet.offline=true keeps everything here"
            raise UserError(f"logger=comet cannot be had ({one_line(error)}); {help}") from error

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Send scalars at a step, as Lightning's logger does."""
        super().log_metrics(without_epoch(metrics), step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run at Comet."""
        super().finalize(status)
        self.experiment.end()
