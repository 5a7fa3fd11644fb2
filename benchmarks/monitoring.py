"""Measure what the monitors cost a training step of the default model.

    python -m benchmarks.monitoring                     writes results/monitoring-cpu.md

One run, in which windows of 10 optimizer steps take turns: no monitors; those that look at every step or log once in a
window; those, and the ones that sample once in a window; those that log, and curvature once. Reported is the time
inside of the monitors, which on a CPU is what they cost, and beside it the difference between windows, which also holds
what else the machine did meanwhile.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from benchmarks.measure import check_counts, machine
from callbacks.divergence.divergence import Divergence
from callbacks.divergence.flight_recorder import FlightRecorder
from callbacks.monitors.curvature import Curvature
from callbacks.monitors.gate_means import GateMeans
from callbacks.monitors.gradient_health import GradientHealth
from callbacks.monitors.representation_collapse import RepresentationCollapse
from callbacks.monitors.signal_propagation import SignalPropagation
from callbacks.monitors.source_weights import SourceWeights
from callbacks.monitors.stream_mixing import StreamMixing
from callbacks.monitors.throughput import Throughput
from core import cli
from core.build import build
from core.dataclass_cli import OVERRIDES
from lightning_modules.composing import compose_run

RUN = "runs/benchmark"
WINDOW, SAMPLED_EVERY, CURVATURE_EVERY = 10, 100, 500  # steps; but for the first, the monitors' defaults
HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


@dataclass(frozen=True)
class MonitoringConfig:
    """Holds the fields that `python -m benchmarks.monitoring` takes.

    Attributes:
        overrides: overrides of the model that is trained, as for train.py; none: experiment=moe_spannorm.
        rounds: the number of rounds, in each of which every window has its turn.
        threads: the number of threads that compute.
        output: the report.
    """

    overrides: tuple[str, ...] = field(default=("experiment=moe_spannorm",), metadata=OVERRIDES)
    rounds: int = 10
    threads: int = 1
    output: Path = Path("results/monitoring-cpu.md")

    def __post_init__(self) -> None:
        check_counts(self, rounds=2, threads=1)


class Turns(L.Callback):
    """Gives each monitor its windows, and times windows and monitors."""

    def __init__(self) -> None:
        logging = [Throughput(), GradientHealth(), FlightRecorder(RUN), Divergence(RUN)]
        sampling = [SignalPropagation(WINDOW), RepresentationCollapse(WINDOW)]
        sampling += [StreamMixing(WINDOW), SourceWeights(WINDOW), GateMeans(WINDOW)]
        self.kinds: list[list[L.Callback]] = [[], logging, [*logging, *sampling], [*logging, Curvature(WINDOW)]]
        self.monitors = [*logging, *sampling, self.kinds[-1][-1]]
        self.seconds: list[list[float]] = [[] for _ in self.kinds]
        self.inside: list[list[float]] = [[] for _ in self.kinds]
        self._started = self._spent = 0.0
        self._kind = 0
        for monitor in self.monitors:
            for hook in HOOKS:
                setattr(monitor, hook, self._in_its_turn(monitor, getattr(monitor, hook)))

    def _in_its_turn(self, monitor: L.Callback, hook: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            if monitor in self.kinds[self._kind]:
                started = time.perf_counter()
                hook(*arguments)
                self._spent += time.perf_counter() - started

        return run

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % WINDOW:
            return
        now = time.perf_counter()
        if trainer.global_step:
            self.seconds[self._kind].append(now - self._started)
            self.inside[self._kind].append(self._spent)
        self._kind = trainer.global_step // WINDOW % len(self.kinds)
        self._started, self._spent = now, 0.0


@cli.tool
def main(settings: MonitoringConfig) -> None:
    config = compose_run(settings.overrides)
    load = machine("cpu")
    torch.set_num_threads(settings.threads)
    L.seed_everything(0, verbose=False)
    datamodule, turns = build(config, "data"), Turns()
    datamodule.prepare_data()
    module = build(config, "module", vocab_size=datamodule.vocab_size)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=(settings.rounds + 1) * len(turns.kinds) * WINDOW + 1,
        gradient_clip_val=1.0,
        log_every_n_steps=WINDOW,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=TensorBoardLogger(RUN, name=""),
        callbacks=[turns, *turns.monitors],
    )
    trainer.fit(module, datamodule=datamodule)

    off, logged = (seconds[1:] for seconds in turns.seconds[:2])  # the first round warms up
    step = statistics.median(off) / WINDOW
    _, log, sampled, curved = (statistics.median(seconds[1:]) for seconds in turns.inside)
    sample, curvature = sampled - log, curved - log
    low, middle, high = statistics.quantiles([b - a for a, b in zip(off, logged, strict=True)], n=4)
    default = (log / WINDOW + sample / SAMPLED_EVERY) / step
    everything = default + curvature / CURVATURE_EVERY / step
    lines = [
        "# What the monitors cost\n",
        f"`python -m benchmarks.monitoring {' '.join(settings.overrides)}`, {len(off)} rounds of "
        f"{len(turns.kinds)} windows of {WINDOW} steps.\ntorch {torch.__version__}; {load}.\n",
        "| | ms |\n|---|---|",
        f"| a step without monitors | {1e3 * step:.1f} |",
        f"| inside of the monitors, {WINDOW} steps of which one is logged | {1e3 * log:.1f} |",
        f"| and for one sample | {1e3 * sample:.1f} |",
        f"| and for one estimate of the curvature | {1e3 * curvature:.0f} |",
        f"| by difference of windows, {WINDOW} steps of which one is logged: quartiles "
        f"| {1e3 * low:.1f}, {1e3 * middle:.1f}, {1e3 * high:.1f} |",
        "\n| on average | share of a step |\n|---|---|",
        f"| default monitors: logged every {WINDOW}, sampled every {SAMPLED_EVERY} steps | **{100 * default:.2f} %** |",
        f"| and curvature every {CURVATURE_EVERY} | **{100 * everything:.2f} %** |",
    ]
    print("\n".join(lines))
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    settings.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    cli.run(main)
