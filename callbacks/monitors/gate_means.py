"""Measures how far open the gates of gated norms are."""

from typing import Any

import lightning as L
from torch import Tensor

from analysis.states import BlockView, gated_parts
from callbacks.charts import block_chart
from callbacks.monitors.block_monitor import BlockMonitor


class GateMeans(BlockMonitor):
    """Logs, for the first optimizer step and every n-th, before it changes the weights:

    | key | unit |
    |---|---|
    | gates/block_NUMBER/PART | mean of the gates of a part of the block, over tokens and features; 0 is shut |

    A part is named as in the block: placement.norm_attn. Where no part has gates (spannorm.Gated) it does nothing.
    Arguments, and what is sampled: callbacks/monitors/block_monitor.py.
    """

    name, prefix = "gate_means", "gates"

    def __init__(self, every_n_steps: int = 100, sequences: int = 2, positions: int = 256) -> None:
        super().__init__(every_n_steps, sequences, positions)
        self._parts: list[tuple[int, str]] = []  # of the last sample

    def applies(self, pl_module: L.LightningModule) -> bool:
        model: Any = pl_module.model
        return any(gated_parts(block) for block in model.blocks)

    def before_sample(self, trainer: L.Trainer, pl_module: L.LightningModule, num_positions: int) -> None:
        self._parts = []

    def measure(self, view: BlockView) -> tuple[Tensor, ...]:
        self._parts += [(view.number, part) for part in view.gates]
        return tuple(view.gates.values())

    def report(self, measured: list[float]) -> dict[str, float]:
        found = zip(self._parts, measured, strict=True)
        return {f"gates/block_{number}/{part}": value for (number, part), value in found}

    def charts(self, pl_module: L.LightningModule) -> dict[str, dict[str, str]]:
        model: Any = pl_module.model
        parts = dict.fromkeys(part for block in model.blocks for part in gated_parts(block))
        return {self.prefix: {part: block_chart(self.prefix, part) for part in parts}} if parts else {}
