"""Gradients, parameters and updates, block by block and kind by kind."""

import math
from collections import deque
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.distributed.tensor import DTensor

from callbacks.charts import block_chart
from callbacks.monitors.noise_scale import CARRIED, NoiseScale, PartialGradient
from callbacks.scalars import write_scalars
from callbacks.statistics import (
    GradientStatistics,
    Group,
    gradient_statistics,
    restore_update,
    update_to_save,
    watch_update,
)
from core.errors import require
from core.steps import is_logged

TREND_POINTS = 20
VANISHING, EXPLODING = 1e-3, 1e3
UPDATE = "last_update"  # in a checkpoint


class GradientHealth(L.Callback):
    """Logs, every `trainer.log_every_n_steps` optimizer steps, of accumulated, reduced and unclipped gradients:

    | key | unit |
    |---|---|
    | gradients/block_NUMBER/KIND | l2 norm of the gradient |
    | gradients/block_NUMBER/all | likewise, over the kinds of a block |
    | weights/block_NUMBER/KIND | l2 norm of the parameters |
    | updates/block_NUMBER/KIND | l2 norm of the last update over that of the parameters |
    | gradients/nonfinite | share of all entries that are infinite or no number |
    | nonfinite/block_NUMBER/KIND | likewise, of the kind's entries; only on steps where it is not 0 |
    | gradients/first_over_last | gradient norm of the first block over that of the last |
    | gradients/first_over_last_trend | change of its natural logarithm in 100 steps, over the last 20 logged ones |
    | gradients/noise_scale | sequences (1812.06162); under accumulation, or DDP of several processes |

    Kinds: attn_in, attn_out, ffn_up, ffn_down, norm, residual, router, experts. Outside of the blocks:
    gradients/embedding, ..., gradients/head, .... Blocks count from 1. An update
    is that of the optimizer step before the logged one, so that all is known at one time; a run's first step has none
    before it.

    Prints a line when the first block's gradient falls below a thousandth of the last one's, or rises above a
    thousandfold.

    Args:
        histogram_every_n_steps: optimizer steps between two histograms of the entries of gradients and parameters in
            TensorBoard, at some 50 ms a million entries; 0: none.

    Raises:
        ConfigError: a negative interval.
    """

    def __init__(self, histogram_every_n_steps: int = 0) -> None:
        every = histogram_every_n_steps
        require(every >= 0, "callbacks.gradient_health.histogram_every_n_steps", every, "an integer >= 0")
        self.histogram_every_n_steps = every
        self.noise_scale = NoiseScale()
        self._partial: PartialGradient | None = None
        self._begins_step = False
        self._sequences = 0  # of one process in one forward pass
        self._verdict = ""
        self._ratios: deque[tuple[int, float]] = deque(maxlen=TREND_POINTS)  # step, log of first over last
        self._update: list[float] = []  # see update_to_save; of the checkpoint that the run goes on from

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._partial = PartialGradient(trainer)
        restore_update(trainer, pl_module, self._update)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[UPDATE] = update_to_save(trainer, pl_module)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(UPDATE)  # older ones have none
        whole = isinstance(saved, list) and all(isinstance(norm, float) for norm in saved)
        self._update = saved if isinstance(saved, list) and whole else []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        model: Any = pl_module.model
        self._sequences = model.count(batch).samples
        self._begins_step = batch_idx % trainer.accumulate_grad_batches == 0

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        # Not earlier, or gradients that other monitors take would be counted.
        assert self._partial is not None
        if self._partial.possible and self._begins_step and is_logged(trainer, trainer.global_step + 1):
            self._partial.watch(pl_module)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._partial is not None
        self._partial.carry(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        step = trainer.global_step + 1
        if is_logged(trainer, step):
            statistics = gradient_statistics(trainer, pl_module)
            values = by_group(statistics) | self._depth(trainer, statistics)
            if CARRIED in statistics.carried:
                values |= self._update_noise_scale(trainer, statistics)
            write_scalars(trainer, values, step)
        if is_logged(trainer, step + 1):
            watch_update(trainer, pl_module)
        if self.histogram_every_n_steps and step % self.histogram_every_n_steps == 0:
            write_histograms(trainer, pl_module)

    def charts(self, pl_module: L.LightningModule) -> dict[str, dict[str, str]]:
        """Return what Dashboard lays out: callbacks.protocols.HasCharts."""
        model: Any = pl_module.model
        kinds = list(dict.fromkeys(kind for block, kind, _ in model.parameter_groups() if block))
        return {
            "gradient norm": {kind: block_chart("gradients", kind) for kind in ("all", *kinds)},
            "update over parameter norm": {kind: block_chart("updates", kind) for kind in kinds},
            "parameter norm": {kind: block_chart("weights", kind) for kind in kinds},
        }

    def _depth(self, trainer: L.Trainer, statistics: GradientStatistics) -> dict[str, float]:
        """Return the gradient of the first block as against the last one's, and say where it vanishes or explodes."""
        by_block = block_norms(statistics)
        first, last = by_block[min(by_block)], by_block[max(by_block)]
        if not (math.isfinite(first) and math.isfinite(last) and first > 0 and last > 0):
            return {}
        ratio = first / last
        verdict = "vanishes" if ratio < VANISHING else "explodes" if ratio > EXPLODING else ""
        if verdict and verdict != self._verdict and trainer.is_global_zero:
            print(f"step {statistics.step}: the gradient {verdict}: block 1 has {ratio:.1e} of the last block's norm")
        self._verdict = verdict
        self._ratios.append((statistics.step, math.log(ratio)))
        return {
            "gradients/first_over_last": ratio,
            "gradients/first_over_last_trend": 100 * slope(list(self._ratios)),
        }

    def _update_noise_scale(self, trainer: L.Trainer, statistics: GradientStatistics) -> dict[str, float]:
        parts = trainer.accumulate_grad_batches * trainer.world_size
        (small_square,) = statistics.carried[CARRIED]
        if not (math.isfinite(small_square) and math.isfinite(statistics.total_norm)):
            return {}
        sizes = self._sequences, parts * self._sequences
        self.noise_scale.update(small_square, sizes[0], statistics.total_norm**2, sizes[1])
        value = self.noise_scale.value
        return {} if value is None else {"gradients/noise_scale": value}

    def state_dict(self) -> dict[str, Any]:
        return {"ratios": list(self._ratios), "noise": self.noise_scale.noise, "signal": self.noise_scale.signal}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._ratios.extend((step, value) for step, value in state_dict["ratios"])
        self.noise_scale.noise, self.noise_scale.signal = state_dict["noise"], state_dict["signal"]


def name(group: Group) -> str:
    """Return `block_3/attn_in`, or the kind alone outside of the blocks."""
    return f"block_{group.block}/{group.kind}" if group.block else group.kind


def block_norms(statistics: GradientStatistics) -> dict[int, float]:
    """Return the gradient norm of each block, over its kinds."""
    parts: dict[int, list[float]] = {}
    for group, norm in zip(statistics.groups, statistics.norms, strict=True):
        parts.setdefault(group.block, []).append(norm)
    return {block: math.hypot(*norms) for block, norms in parts.items() if block > 0}


def by_group(statistics: GradientStatistics) -> dict[str, float]:
    """Return what is logged of each group, by key."""
    by_block = block_norms(statistics)
    chosen = list(enumerate(statistics.groups))
    values = {f"gradients/{name(group)}": statistics.norms[i] for i, group in chosen}
    values |= {f"gradients/block_{block}/all": norm for block, norm in by_block.items()}
    values |= {f"weights/{name(group)}": statistics.parameter_norms[i] for i, group in chosen}
    if statistics.update_norms:
        for i, group in chosen:
            values[f"updates/{name(group)}"] = statistics.update_norms[i] / max(statistics.parameter_norms[i], 1e-30)
    values["gradients/nonfinite"] = statistics.nonfinite_share
    shares = zip(statistics.groups, statistics.nonfinite, strict=True)
    return values | {f"nonfinite/{name(group)}": share for group, share in shares if share > 0}


def slope(points: list[tuple[int, float]]) -> float:
    """Return the slope of the least-squares line through (x, y); 0 for a single point."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def write_histograms(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Write histograms of the entries of gradients and parameters, one a group."""
    model: Any = pl_module.model
    parts: dict[str, list[Tensor]] = {}
    for block, kind, parameter in model.parameter_groups():
        for quantity, tensor in (("gradients", parameter.grad), ("weights", parameter)):
            if tensor is not None:
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # by all processes
                parts.setdefault(f"histograms/{quantity}/{name(Group(block, kind))}", []).append(whole.flatten())
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            for tag, tensors in parts.items():
                values = torch.cat(tensors).detach().float()
                values = values[values.isfinite()]  # TensorBoard fails on the others; nonfinite/... counts them
                if len(values):
                    logger.experiment.add_histogram(tag, values, trainer.global_step)
