"""Callbacks ask these things of each other: one finds another by what it can do, whatever its class is.

A callback of your own takes part by having the method; it needs to derive from nothing here.
core.run_control.SavesBeforeLeaving is one more: the run asks for it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import lightning as L


@runtime_checkable
class HasCharts(Protocol):
    """Has charts for TensorBoard's tab Custom Scalars, which Dashboard lays out."""

    def charts(self, pl_module: L.LightningModule) -> dict[str, dict[str, str]]:
        """Return {group of charts: {title: pattern of tags}}."""


@runtime_checkable
class ChoosesScalars(Protocol):
    """Is shown what monitors and routers measure of each block, and chooses what the loggers get of it.

    Asked by core.chosen_scalars.
    """

    def choose_scalars(self, values: Mapping[str, float], step: int) -> Mapping[str, float]:
        """Return what is to be written; called in every process, with the optimizer step counted from 1."""


@runtime_checkable
class CountsUnits(Protocol):
    """Knows on how much the run has trained, in tokens or images (core.task.Task.counted), which RunSummary reports."""

    @property
    def total_units(self) -> int:
        """Return them since step 0, over all processes, earlier ones of the same run included."""

    @property
    def units_per_second(self) -> float:
        """Return the mean over this process' training so far, of all processes."""


@runtime_checkable
class RecordsEvents(Protocol):
    """Is told by Divergence of each event, amid the step that it belongs to."""

    def record_event(self, trainer: L.Trainer, line: str) -> None:
        """Keep what is known of the step in progress; the line says what has happened."""


@runtime_checkable
class KeepsBeside(Protocol):
    """Saves checkpoints that the run can be resumed from, and with each of them what others keep beside it."""

    def keep_beside(self, save: Callable[[Path], None]) -> None:
        """Call `save` in every process before each checkpoint, with the folder core.checkpoint.folder_beside names.

        The folder stays as long as the checkpoint does.
        """
