"""Keeps snapshots over a stop: beside each checkpoint, a file for each process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from callbacks.divergence.detectors import Detectors
from callbacks.divergence.policies.snapshot import Snapshot
from callbacks.protocols import KeepsBeside
from core import tensor_archive
from core.atomic_write import damage, save
from core.checkpoint import folder_beside


class SnapshotFile:
    """Reads and writes checkpoints/step_N/snapshots-rank-R.pt, the latter before the checkpoint of step N.

    The step, the number of processes and the detectors' histories, which no two runs share, say whether it belongs to
    the checkpoint that a run goes on from.

    Args:
        snapshots: what there is to save.
    """

    def __init__(self, trainer: L.Trainer, detectors: Detectors, snapshots: Callable[[], list[Snapshot]]) -> None:
        self.trainer, self.detectors, self.snapshots = trainer, detectors, snapshots
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, KeepsBeside):
                callback.keep_beside(self.save)

    def save(self, folder: Path) -> None:
        """Write this process' file, whole or not at all."""
        identity = self._identity(self.detectors.state_dict())
        content = {**identity, "snapshots": [s.state_dict() for s in self.snapshots()]}
        save(content, self._path(folder))

    def load(self, detectors: dict[str, Any]) -> list[Snapshot]:
        """Return the snapshots that belong to the checkpoint this run goes on from, in order.

        There are none unless all processes have theirs, or they would go back to different steps.

        Args:
            detectors: their state as the checkpoint has it.
        """
        if self.trainer.ckpt_path is None:
            return []
        path = self._path(folder_beside(Path(self.trainer.ckpt_path), self.trainer.global_step))
        content = tensor_archive.load(path) if path.exists() and damage(path) is None else None
        found: dict[str, Any] = content if isinstance(content, dict) else {}
        mine = {key: found.get(key) for key in self._identity(detectors)} == self._identity(detectors)
        snapshots: list[Snapshot] = []
        try:
            snapshots = [Snapshot.from_state_dict(state) for state in found.get("snapshots", [])]
        except (ValueError, TypeError, AttributeError):  # the file says that it is ours, but is not
            mine = False
        return snapshots if self._all(mine) else []

    def _path(self, folder: Path) -> Path:
        return folder / f"snapshots-rank-{self.trainer.global_rank}.pt"

    def _identity(self, detectors: dict[str, Any]) -> dict[str, Any]:
        return {"step": self.trainer.global_step, "world_size": self.trainer.world_size, "detectors": detectors}

    def _all(self, mine: bool) -> bool:
        """Return whether it is so in every process."""
        if self.trainer.world_size == 1:
            return mine
        flag = torch.tensor(int(mine), device=self.trainer.strategy.root_device)
        return bool(self.trainer.strategy.reduce(flag, reduce_op="min"))
