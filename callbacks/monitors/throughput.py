"""Measures how many tokens or images a second the training step gets through, and what of the machine it uses."""

import logging
import resource
import sys
import time
from collections import deque
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.profilers import PassThroughProfiler

from callbacks.scalars import write_scalars
from core.device_peaks import peak_of
from core.errors import require
from core.parallel import num_data_parts
from core.steps import completes_step, is_logged
from core.task import task_of

log = logging.getLogger(__name__)

PERCENTILE_STEPS = 100


class DataWait(PassThroughProfiler):
    """Stands in for Lightning's profiler that does nothing, to see how long the loop waits for batches.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds, self._started = 0.0, 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self._started = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self.seconds += time.perf_counter() - self._started


class Throughput(L.Callback):
    """Logs, every `trainer.log_every_n_steps` optimizer steps, validation never counted:

    | key | unit |
    |---|---|
    | train/tokens | tokens seen by all ranks since step 0; of images train/images |
    | train/tokens_per_second | all ranks, since the last log; of images train/images_per_second |
    | train/mfu | model FLOP/s over the devices' peak (2204.02311, appendix B), since the last log; with a known peak |
    | train/data_wait_share | share of the time since the last log in which the loop waited for batches; unless a |
    | | profiler of Lightning's is on |
    | train/step_seconds_p50, train/step_seconds_p95 | percentiles of the optimizer steps' seconds, over the last 100 |
    | train/memory_peak | GiB; allocated on a CUDA device, elsewhere the process' resident memory, since it began |

    Args:
        peak_flops: FLOP/s of one device in the run's precision. None: what core/device_peaks.py knows of it. Where
            that is nothing, as of a CPU, there is no train/mfu.

    Attributes:
        seconds: time spent on training steps in this process.
        units: tokens or images (core.task.Task.counted) seen by all ranks in this process.

    Raises:
        ConfigError: a peak that is not positive.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        valid = "a number > 0, in FLOP/s, or null"
        require(peak_flops is None or peak_flops > 0, "callbacks.throughput.peak_flops", peak_flops, valid)
        self.peak_flops = peak_flops
        self.seconds, self.units, self.units_before = 0.0, 0, 0
        self._started = 0.0
        self._step_seconds = 0.0  # of the optimizer step in progress
        self._steps: deque[float] = deque(maxlen=PERCENTILE_STEPS)
        self._wait: DataWait | None = None
        self._waited = 0.0
        self._window = (0.0, 0, 0.0)

    @property
    def units_per_second(self) -> float:
        """Return the mean over this process' steps so far."""
        return self.units / max(self.seconds, 1e-9)

    @property
    def total_units(self) -> int:
        """Return the tokens or images since step 0, earlier processes of the same run included."""
        return self.units_before + self.units

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.peak_flops is None:
            device = trainer.strategy.root_device
            self.peak_flops = peak_of(device, trainer.precision)
            if self.peak_flops is None and device.type != "cpu" and trainer.is_global_zero:
                name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
                what = f"no peak FLOP/s are known of {name} in trainer.precision={trainer.precision}"
                log.warning("No train/mfu: %s; callbacks.throughput.peak_flops can say them", what)
        if type(trainer.profiler) is PassThroughProfiler:  # type: ignore[attr-defined]
            trainer.profiler = self._wait = DataWait()  # type: ignore[attr-defined]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._started == 0.0:
            self._started = time.perf_counter()
            self._take_wait()  # was before the time that counts

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # From end to end of a step, so that waiting for data counts.
        now = time.perf_counter()
        self.seconds += now - self._started
        self._step_seconds += now - self._started
        self._started = now
        self._waited += self._take_wait()
        model: Any = pl_module.model
        count = model.count(batch)
        self.units += count.units * num_data_parts(trainer)
        if not completes_step(trainer, batch_idx):
            return
        self._steps.append(self._step_seconds)
        self._step_seconds = 0.0
        if is_logged(trainer, trainer.global_step):
            self._log(trainer, pl_module, count)

    def _take_wait(self) -> float:
        """Return the seconds waited since the last call."""
        if self._wait is None:
            return 0.0
        seconds, self._wait.seconds = self._wait.seconds, 0.0
        return seconds

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule, count: Any) -> None:
        module: Any = pl_module
        counted = task_of(module).counted
        now = (self.seconds, self.units, self._waited)
        seconds, units, waited = (value - before for value, before in zip(now, self._window, strict=True))
        self._window = now
        rate = units / max(seconds, 1e-9)
        pl_module.log(f"train/{counted}_per_second", rate)

        median, slow = np.percentile(self._steps, [50, 95]).tolist()
        values = {
            f"train/{counted}": float(self.total_units),  # not by log, which keeps fp32: exact to 2**24 only
            "train/step_seconds_p50": median,
            "train/step_seconds_p95": slow,
            "train/memory_peak": peak_memory(trainer.strategy.root_device),
        }
        if self._wait:
            values["train/data_wait_share"] = waited / max(seconds, 1e-9)
        if self.peak_flops:
            positions = rate * count.samples * count.positions / count.units  # a second
            flops = positions * module.model.flops_per_token(count.positions)
            values["train/mfu"] = flops / (self.peak_flops * trainer.world_size)
        write_scalars(trainer, values, trainer.global_step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.total_units}  # by the name that checkpoints have always had

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.units_before = state_dict["tokens"]


def peak_memory(device: torch.device) -> float:
    """Return the peak of memory since the process began, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
