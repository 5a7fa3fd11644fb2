"""Keeps snapshots over a stop: beside each checkpoint, a file for each process."""

import sys
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
from core.printable import printable
from core.untrusted import Untrusted


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

    def load(self, detectors: dict[str, Any], like: Snapshot) -> list[Snapshot]:
        """Return the snapshots that belong to the checkpoint this run goes on from, in order.

        There are none unless all processes have theirs, or they would go back to different steps.

        Args:
            detectors: their state as the checkpoint has it.
            like: one of the run as it stands.
        """
        if self.trainer.ckpt_path is None:
            return []
        path = self._path(folder_beside(Path(self.trainer.ckpt_path), self.trainer.global_step))
        snapshots = self._read(path, detectors, like) if path.exists() else None
        return (snapshots or []) if self._all(snapshots is not None) else []

    def _read(self, path: Path, detectors: dict[str, Any], like: Snapshot) -> list[Snapshot] | None:
        """Return what is in a file; None: it is not of this run, which is said."""
        try:
            if wrong := damage(path):
                raise ValueError(wrong)
            content = tensor_archive.load(path)
            found = content if isinstance(content, dict) else {}
            identity = self._identity(detectors)
            # A tensor in the place of a number has no truth of its own: RuntimeError.
            if {key: found.get(key) for key in identity} != identity:
                raise ValueError("it belongs to another checkpoint, or number of processes")
            snapshots = found.get("snapshots")
            if not isinstance(snapshots, list):
                raise ValueError("it has no snapshots")
            return [Snapshot.from_state_dict(state, like) for state in snapshots[-2:]]
        except (Untrusted, OSError, ValueError, RuntimeError) as error:
            line = f"{printable(path)} is passed over, and the run starts without snapshots: {printable(error)}"
            print(line, file=sys.stderr)
            return None

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
