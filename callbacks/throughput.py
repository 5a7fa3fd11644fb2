"""How many tokens a second the training step gets through."""

import time
from typing import Any

import lightning as L

from core.steps import completes_step, is_logged


class Throughput(L.Callback):
    """Logs, every `trainer.log_every_n_steps` optimizer steps:

    | key | unit |
    |---|---|
    | train/tokens | tokens seen by all ranks since step 0 |
    | train/tokens_per_second | all ranks, since the last log; validation not counted |

    Attributes:
        seconds: time spent on training steps in this process.
        tokens: tokens seen by all ranks in this process.
    """

    def __init__(self) -> None:
        self.seconds, self.tokens, self.tokens_before = 0.0, 0, 0
        self._started = 0.0
        self._window = (0.0, 0)

    @property
    def tokens_per_second(self) -> float:
        """Mean over this process' steps so far."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def total_tokens(self) -> int:
        """Since step 0, earlier processes of the same run included."""
        return self.tokens_before + self.tokens

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._started == 0.0:
            self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # From end to end of a step, so that waiting for data counts.
        now = time.perf_counter()
        self.seconds += now - self._started
        self._started = now
        self.tokens += batch["tokens"][:, 1:].numel() * trainer.world_size
        if not completes_step(trainer, batch_idx) or not is_logged(trainer, trainer.global_step):
            return
        seconds, tokens = self.seconds - self._window[0], self.tokens - self._window[1]
        self._window = (self.seconds, self.tokens)
        pl_module.log("train/tokens_per_second", tokens / max(seconds, 1e-9))
        pl_module.log("train/tokens", float(self.total_tokens))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.total_tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens_before = state_dict["tokens"]
