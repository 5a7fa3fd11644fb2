"""Keeps random numbers on course across a stop and resume."""

from typing import Any

import lightning as L
import torch


class RandomState(L.Callback):
    """Saves torch's generators with each checkpoint (rank 0's, for all ranks) and restores them at the first step.

    Only what draws while it trains depends on them, as the router's jitter does; the order of the data is stateless.
    """

    def __init__(self) -> None:
        self._saved: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if "cpu" in self._saved:
            torch.set_rng_state(self._saved["cpu"].cpu())
        if "cuda" in self._saved and torch.cuda.is_available():
            torch.cuda.set_rng_state(self._saved["cuda"].cpu())
        self._saved = {}
