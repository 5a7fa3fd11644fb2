"""Lightning's logger for TensorBoard, less what says nothing of a run whose data have no end."""

from collections.abc import Mapping

from lightning.pytorch.loggers import TensorBoardLogger


class TensorBoard(TensorBoardLogger):
    """Leaves out `epoch`, which Lightning adds to every step's metrics: the stream is a single one, number 0."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write scalars at a step, as Lightning's logger does."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)
