"""Keeps random numbers on course across a stop and resume."""

from typing import Any

import lightning as L
import torch
import torch.distributed as dist


class RandomState(L.Callback):
    """Saves the torch generators of every process with each checkpoint, and restores them at the first step.

    A process gets back those of its own rank. One that had no such rank before, because the run goes on in more
    processes, keeps those that it has.

    Only what draws while it trains depends on them, as the router's jitter does; the order of the data is stateless.
    """

    def __init__(self) -> None:
        self._saved: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """By all processes together, as Lightning does it."""
        own: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            own["cuda"] = torch.cuda.get_rng_state()
        ranks = [own]
        if dist.is_initialized():
            ranks = [own] * dist.get_world_size()
            dist.all_gather_object(ranks, own)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict["ranks"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        own = self._saved[rank] if rank < len(self._saved) else {}
        if "cpu" in own:
            torch.set_rng_state(own["cpu"].cpu())
        if "cuda" in own and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda"].cpu())
        self._saved = []
