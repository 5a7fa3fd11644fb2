"""Notes events in RUN/events.jsonl, in TensorBoard and on the console."""

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.scalars import write_scalars
from core.printable import printable


class EventLog:
    """Notes events; one process writes for all.

    Args:
        run_dir: the run's folder.
    """

    def __init__(self, run_dir: str) -> None:
        self.path = Path(run_dir) / "events.jsonl"

    def write(self, trainer: L.Trainer, line: str, event: dict[str, Any], scalars: dict[str, float]) -> None:
        """Note one event, during the step it belongs to. All processes call it.

        Args:
            line: for people.
            event: for programs; values that are no number become null in the file.
            scalars: for the loggers, by key.
        """
        write_scalars(trainer, scalars, trainer.global_step + 1)
        if not trainer.is_global_zero:
            return
        print(printable(line, limit=None), flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({key: _plain(value) for key, value in event.items()}, allow_nan=False) + "\n")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("divergence/event", line, trainer.global_step)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [_plain(item) for item in value] if isinstance(value, list) else value
