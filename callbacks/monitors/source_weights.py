"""Measures which sublayer reads what, where a placement lets them choose: attention over depth, as a matrix."""

from itertools import islice
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from analysis.states import BlockView
from callbacks.charts import BLOCK
from callbacks.monitors.block_monitor import BlockMonitor
from callbacks.scalars import written_blocks

CELL = 8
"""Pixels of the side of a matrix entry in the picture."""


class SourceWeights(BlockMonitor):
    """Logs, for the first optimizer step and every n-th, before it changes the weights:

    | key | unit |
    |---|---|
    | sources/block_NUMBER/SUBLAYER/from_SOURCE | weight of a source in what a sublayer reads, mean over tokens |

    Sublayers are attn, ffn, and out for the head. Source 0 is the embedding; then come the outputs of sublayers,
    or the sums of groups of them (model.placement=attnres). Of more than 16 sources a choice is written.

    TensorBoard gets the whole matrix as a picture, sources/weights: a row for each sublayer, the first at the top, a
    column for each source; white is the largest weight of its row.

    Where the placement has no such weights (Placement.readers) it does nothing. Arguments, and what is sampled:
    callbacks/monitors/block_monitor.py.
    """

    name, prefix = "source_weights", "sources"

    def __init__(self, every_n_steps: int = 100, sequences: int = 2, positions: int = 256) -> None:
        super().__init__(every_n_steps, sequences, positions)
        self._rows: list[tuple[int, str, int]] = []  # of the last sample: block, sublayer, number of sources

    def applies(self, pl_module: L.LightningModule) -> bool:
        model: Any = pl_module.model
        return any(block.placement.readers() for block in model.blocks)

    def before_sample(self, trainer: L.Trainer, pl_module: L.LightningModule, num_positions: int) -> None:
        self._rows = []

    def measure(self, view: BlockView) -> tuple[Tensor, ...]:
        self._rows += [(view.number, name, len(weights)) for name, weights in view.weights.items()]
        return tuple(weight for weights in view.weights.values() for weight in weights.flatten(1).mean(1))

    def report(self, measured: list[float]) -> dict[str, float]:
        return {
            f"sources/block_{number}/{name}/from_{source}": row[source]
            for (number, name, count), row in zip(self._rows, self._split(measured), strict=True)
            for source in sorted(written_blocks(range(count)))
        }

    def write(self, trainer: L.Trainer, measured: list[float], step: int) -> None:
        super().write(trainer, measured, step)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                picture = draw(self._split(measured))
                logger.experiment.add_image("sources/weights", picture, step - 1, dataformats="HW")

    def charts(self, pl_module: L.LightningModule) -> dict[str, dict[str, str]]:
        if not self.applies(pl_module):
            return {}
        return {
            self.prefix: {f"{name} reads": rf"^sources/{BLOCK}/{name}/from_\d+$" for name in ("attn", "ffn", "out")}
        }

    def _split(self, measured: list[float]) -> list[list[float]]:
        """Return the weights of each sublayer."""
        values = iter(measured)
        return [list(islice(values, count)) for _, _, count in self._rows]


def draw(rows: list[list[float]]) -> Tensor:
    """Return the matrix of weights as a picture, [height, width], each row divided by its largest weight."""
    matrix = torch.zeros(len(rows), max(map(len, rows)))
    for line, row in zip(matrix, rows, strict=True):
        line[: len(row)] = torch.tensor(row) / max(row)
    return matrix.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)
