"""Lightning's logger for TensorBoard, less what says nothing of a run that has a folder and data without an end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from core.event_files import OVERVIEW, event_folder
from core.loggers import without_epoch

FIRST = {
    "train/loss": "1_train_loss",
    "val/loss": "2_val_loss",
    "val/accuracy": "3_val_accuracy",
    "val/bigram_loss": "3_bigram_loss",
    "optim/grad_norm": "4_gradient_norm",
    "divergence/grad_norm": "5_gradient_norm_at_alarms",
    "gradients/first_over_last": "6_first_over_last",
    "optim/lr": "7_learning_rate",
    "train/tokens_per_second": "8_tokens_per_second",
    "train/images_per_second": "8_images_per_second",
}
"""What one looks at first, by tag, and how it is called in the group that TensorBoard's Time Series begins with."""


def with_overview(values: Mapping[str, float]) -> dict[str, float]:
    """Return the scalars, and those of FIRST a second time under a name that sorts before all others."""
    return {**values, **{f"{OVERVIEW}/{FIRST[tag]}": value for tag, value in values.items() if tag in FIRST}}


class TensorBoard(TensorBoardLogger):
    """Writes event files into the run's folder, after which TensorBoard calls the run, and nothing else.

    Its page opens on Time Series, where groups of curves stand by the alphabet: so the first one has an overview.

    `epoch` is left out, which Lightning adds to every step's metrics: the stream is a single one, number 0. So is
    hparams.yaml: what it holds is in RUN/config.yaml.

    Args:
        save_dir: the run's folder.
        name: of a folder within it; likewise `version`, of a folder within that one.
        version: of the event files; none: they lie in `save_dir`.
        default_hp_metric: as in Lightning's logger, which takes `options` as well.
        options: of torch.utils.tensorboard.SummaryWriter, as flush_secs.
    """

    def __init__(
        self,
        save_dir: str | Path,
        name: str = "",
        version: str = "",
        default_hp_metric: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(save_dir, name, version, default_hp_metric=default_hp_metric, **options)

    @property
    def log_dir(self) -> str:
        """The folder of the event files; where an older run has one of its own, that one."""
        return str(event_folder(Path(super().log_dir)))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write scalars at a step, as Lightning's logger does."""
        super().log_metrics(with_overview(without_epoch(metrics)), step)

    @rank_zero_only
    def save(self) -> None:
        """Write out what is held back."""
        self.experiment.flush()
