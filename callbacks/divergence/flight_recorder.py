"""Keeps the last steps in memory, and writes them out when something happens to the run."""

from collections import deque
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from callbacks.divergence.loss_scaling import refuse_loss_scaling
from callbacks.divergence.samples import samples_of_step
from callbacks.statistics import gradient_statistics
from core.atomic_write import save
from core.errors import require
from core.printable import printable
from core.run_control import TrainingInterrupted

FOLDER = "flight_recorder"


class FlightRecorder(L.Callback):
    """Writes RUN/flight_recorder/step_N_rank_R.pt when callbacks.divergence reports an event, and when the process dies
    on an exception; `python -m tools.replay RUN` goes through that step again.

    | key of the file | what |
    |---|---|
    | reason | the event, or the exception, in a line |
    | step, samples | the step in progress, counted from 1, or the last one; its global sample numbers, [first, last] |
    | world_size | processes, each of which has a file |
    | batches | its accumulated batches on this rank: "tokens" [sequences, seq + 1], and what else is in them |
    | steps | of the last `num_steps`, oldest first: step, samples, losses, grad_norm, norms, nonfinite |
    | groups | [block, kind] that norms and nonfinite go by |

    Losses are this rank's, one for each batch, in nats per token; the rest is over all processes, before clipping.

    Args:
        run_dir: the run's folder.
        num_steps: how far back it remembers.
        max_files: that one process writes about events; the first ones tell the cause.

    Raises:
        ConfigError: no room for a step or a file, or a precision that scales the loss.
    """

    def __init__(self, run_dir: str, num_steps: int = 64, max_files: int = 20) -> None:
        require(num_steps >= 1, "callbacks.flight_recorder.num_steps", num_steps, "an integer >= 1")
        require(max_files >= 1, "callbacks.flight_recorder.max_files", max_files, "an integer >= 1")
        self.folder, self.max_files, self.num_files = Path(run_dir) / FOLDER, max_files, 0
        self.steps: deque[dict[str, Any]] = deque(maxlen=num_steps)
        self.groups: list[list[Any]] = []
        self.step = self.written = 0  # the step in progress, and the last one written out
        self.samples: list[int] | None = None
        self.batches: list[dict[str, Tensor]] = []
        self.losses: list[Tensor] = []  # stay on the device until somebody asks

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        refuse_loss_scaling(trainer)
        self.folder = trainer.strategy.broadcast(self.folder)  # ranks started at different seconds name other folders

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.batches, self.losses = [], []
            self.step, self.samples = trainer.global_step + 1, samples_of_step(trainer)
        self.batches.append(batch)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self.losses.append(loss.detach() * trainer.accumulate_grad_batches)  # Lightning has divided by it

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        statistics = gradient_statistics(trainer, pl_module)
        self.groups = [[group.block, group.kind] for group in statistics.groups]
        self.steps.append(
            {
                "step": self.step,
                "samples": self.samples,
                "losses": self.losses,
                "grad_norm": statistics.total_norm,
                "norms": statistics.norms,
                "nonfinite": statistics.nonfinite,
            }
        )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if not self.batches or isinstance(exception, KeyboardInterrupt | TrainingInterrupted):
            return
        when = "after this step, " if trainer.global_step >= self.step else ""
        try:
            self._write(trainer, f"{when}{type(exception).__name__}: {exception}")
        except Exception as failure:  # as of a device that is lost: it must not stand in for what the process dies of
            first_line = str(failure).partition("\n")[0]
            print(f"The flight recorder wrote nothing: {type(failure).__name__}: {printable(first_line)}", flush=True)

    def record_event(self, trainer: L.Trainer, line: str) -> None:
        """Write out what is known of the step in progress and of those before."""
        if self.num_files < self.max_files and self.written != self.step:
            self.num_files += 1
            self._write(trainer, line)

    def _write(self, trainer: L.Trainer, reason: str) -> None:
        """Write the file, once a step; one of that step from before a resumption makes way."""
        if self.written == self.step:
            return
        self.written = self.step
        content = {
            "reason": reason,
            "step": self.step,
            "samples": self.samples,
            "world_size": trainer.world_size,
            "batches": [{name: tensor.cpu() for name, tensor in batch.items()} for batch in self.batches],
            "steps": [{**step, "losses": [float(loss) for loss in step["losses"]]} for step in self.steps],
            "groups": self.groups,
        }
        save(content, self.folder / f"step_{self.step}_rank_{trainer.global_rank}.pt")
