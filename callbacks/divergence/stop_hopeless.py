"""Ends a run that will come to nothing, so that a study spends its hours on the others."""

import math
from collections import deque
from typing import Any

import lightning as L
import torch

from core.errors import require
from core.steps import is_logged

WINDOW = 0.1
"""Share of the run's logged steps whose mean loss is looked at."""


class StopHopeless(L.Callback):
    """Ends training at a loss that is no number, or that is still above the unigram loss late in the run.

    The unigram loss is that of the tokens' frequencies alone: a model above it has learned nothing of the context. The
    rule knows nothing of other runs, so that what a run comes to does not depend on what ran before it. A study's
    record says that the run was stopped, and why (docs/studies.md).

    Args:
        after: share of `max_steps` from which on the mean training loss, over the last tenth of the run, must be below
            the unigram loss.

    Raises:
        ConfigError: `after` is no share.
    """

    def __init__(self, after: float = 0.2) -> None:
        valid = f"a number from {WINDOW}, the share of the run whose mean is looked at, to 1"
        require(WINDOW <= after <= 1, "callbacks.stop_hopeless.after", after, valid)
        self.after = after
        self.stopping_reason: str | None = None
        self.losses: deque[float] = deque()
        self._unigram_loss: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        measure = getattr(getattr(trainer, "datamodule", None), "unigram_loss", None)
        self._unigram_loss = measure() if measure is not None else None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        done = trainer.global_step
        loss = trainer.callback_metrics.get("train/loss")  # of the step before: the module logs behind all callbacks
        first_batch = batch_idx % trainer.accumulate_grad_batches == 0
        if not first_batch or loss is None or done == 0 or not is_logged(trainer, done):
            return
        self.losses.append(float(loss))
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        size = max(1, round(WINDOW * trainer.max_steps / every))
        while len(self.losses) > size:
            self.losses.popleft()
        mean = sum(self.losses) / len(self.losses)
        reason = None
        if not math.isfinite(self.losses[-1]):
            reason = f"training loss {self.losses[-1]} at step {done}"
        elif self._unigram_loss is not None and done >= self.after * trainer.max_steps and mean > self._unigram_loss:
            steps = f"the last {len(self.losses)} logged steps"
            reason = f"training loss {mean:.3f} over {steps}, above {self._unigram_loss:.3f} of the tokens' frequencies"
        if trainer.strategy.reduce_boolean_decision(reason is not None, all=False):
            self.stopping_reason = reason or "another process has found the run hopeless"
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"losses": torch.tensor(list(self.losses), dtype=torch.float64)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses = deque(state_dict["losses"].tolist())
