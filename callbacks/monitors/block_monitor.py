"""Watches the blocks from inside, in a forward pass of its own of a few sequences."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor

from analysis.evaluating import evaluating
from analysis.states import BlockView, watching
from callbacks.charts import block_chart
from callbacks.scalars import write_scalars
from callbacks.statistics import add_to_transfer, gradient_statistics
from core.errors import require


class BlockMonitor(L.Callback):
    """Logs NAME/block_NUMBER/FIGURE for the first optimizer step, every n-th and the last, before the weights change.

    A subclass says what it measures of a block. Sampled are the first sequences of the step, of the first process;
    documents packed into one are seen as one text, whatever `data.document_mask` is in training. Monitors that sample
    the same share one forward pass. Blocks count from 1.

    Args:
        every_n_steps: optimizer steps between two samples.
        sequences: at most so many of the batch.
        positions: at most so many of each sequence.

    Raises:
        ConfigError: one of them is too small; before the first step, where sequences are of one position.
    """

    name: ClassVar[str]  # of the entry in configs/callbacks
    prefix: ClassVar[str]  # of the keys
    figures: tuple[str, ...]

    def __init__(self, every_n_steps: int = 100, sequences: int = 2, positions: int = 256) -> None:
        limits = (("every_n_steps", every_n_steps, 1), ("sequences", sequences, 1), ("positions", positions, 2))
        for field, value, least in limits:
            require(value >= least, f"callbacks.{self.name}.{field}", value, f"an integer >= {least}")
        self.every_n_steps, self.sequences, self.positions = every_n_steps, sequences, positions

    @abstractmethod
    def measure(self, view: BlockView) -> tuple[Tensor, ...]:
        """Return the figures, scalars on the device, in the order of `figures`."""

    def applies(self, pl_module: L.LightningModule) -> bool:
        """Return whether there is something to measure of this model."""
        return True

    def before_sample(self, trainer: L.Trainer, pl_module: L.LightningModule, num_positions: int) -> None:
        """Prepare for a sample of the weights as they are; called right before it."""

    def constants(self, number: int) -> dict[str, float]:
        """Return further figures of a block, which are not measured."""
        return {}

    def charts(self, pl_module: L.LightningModule) -> dict[str, dict[str, str]]:
        """Return what Dashboard lays out: callbacks.protocols.HasCharts."""
        return {self.prefix: {figure.replace("_", " "): block_chart(self.prefix, figure) for figure in self.figures}}

    def report(self, measured: list[float]) -> dict[str, float]:
        """Return what is logged, by key, of the figures of all blocks in turn."""
        size, values = len(self.figures), {}
        for number in range(1, len(measured) // size + 1):
            of_block = dict(zip(self.figures, measured[(number - 1) * size : number * size], strict=True))
            for figure, value in (of_block | self.constants(number)).items():
                values[f"{self.prefix}/block_{number}/{figure}"] = value
        return values

    def write(self, trainer: L.Trainer, measured: list[float], step: int) -> None:
        """Hand what was measured before the optimizer step of this number, counted from 1, to the loggers."""
        write_scalars(trainer, self.report(measured), step)

    def _is_sampled(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        step = trainer.global_step + 1
        return (step in (1, trainer.max_steps) or step % self.every_n_steps == 0) and self.applies(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches or not self._is_sampled(trainer, pl_module):
            return
        monitors = self._sharing(trainer, pl_module)
        if monitors[0] is not self:
            return
        model: Any = pl_module.model
        sample = model.excerpt(batch, self.sequences, self.positions)
        number = model.count(sample).positions
        valid = f"an integer >= 2 for callbacks.{self.name}, which compares positions"
        require(number >= 2, "data.seq_len", number, valid)
        measured: dict[BlockMonitor, list[Tensor]] = {monitor: [] for monitor in monitors}

        def see(view: BlockView) -> None:
            for monitor, figures in measured.items():
                figures += [torch.stack(of_block)] if (of_block := monitor.measure(view)) else []

        for monitor in monitors:
            monitor.before_sample(trainer, pl_module, number)
        self._forward(trainer, model, sample, see)
        for monitor, figures in measured.items():
            add_to_transfer(pl_module, monitor.prefix, torch.cat(figures))

    def _sharing(self, trainer: L.Trainer, pl_module: L.LightningModule) -> "list[BlockMonitor]":
        """Return the run's monitors that sample the same of this step, in order: one forward pass serves them all."""
        monitors = [c for c in trainer.callbacks if isinstance(c, BlockMonitor)]  # type: ignore[attr-defined]
        mine = self.sequences, self.positions
        due = (m for m in monitors if m._is_sampled(trainer, pl_module))
        return [m for m in due if (m.sequences, m.positions) == mine]

    @torch.no_grad()
    def _forward(
        self, trainer: L.Trainer, model: Any, sample: dict[str, Tensor], see: Callable[[BlockView], None]
    ) -> None:
        """Run the model once, without a graph or random numbers, so training stays the same."""
        with evaluating(model), trainer.precision_plugin.forward_context(), watching(model, see):
            model.observe(sample)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if self._is_sampled(trainer, pl_module):
            step = trainer.global_step + 1
            self.write(trainer, gradient_statistics(trainer, pl_module).carried[self.prefix], step)
