"""Keeps random numbers on course across a stop and resume."""

from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from core.parallel import data_part, num_data_parts


class RandomState(L.Callback):
    """Saves the torch generators with each checkpoint, and restores them at the first step.

    They go by parts of the batch: processes that cut one model have the same part, and must draw the same numbers. A
    part that was not there before, because the run goes on in more processes, keeps the generators that it has.

    Only what draws while it trains depends on them, as the router's jitter does; the order of the data is stateless.
    """

    def __init__(self) -> None:
        self._saved: list[dict[str, Any]] = []
        self._num_parts = 1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._num_parts = num_data_parts(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the generators' states, one a part of the batch; all processes call it, as Lightning does."""
        own: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            own["cuda"] = torch.cuda.get_rng_state()
        ranks = [own]
        if dist.is_initialized():
            ranks = [own] * dist.get_world_size()
            dist.all_gather_object(ranks, own)
        return {"parts": ranks[:: len(ranks) // self._num_parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Version 0.1 saved them by process, which is the same unless processes cut one model.
        self._saved = state_dict["parts"] if "parts" in state_dict else state_dict["ranks"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        part = data_part(trainer)
        own = self._saved[part] if part < len(self._saved) else {}
        if "cpu" in own:
            torch.set_rng_state(own["cpu"].cpu())
        if "cuda" in own and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda"].cpu())
        self._saved = []
