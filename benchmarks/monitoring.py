"""What the monitors cost a training step of the default model.

    python -m benchmarks.monitoring                     writes docs/results/monitoring-cpu.md

One run, in which windows of 10 optimizer steps take turns: no monitors; those that look at every step or log once in a
window; those, and the ones that sample once in a window. Reported is the time inside of the monitors, which on a CPU is
what they cost, and beside it the difference between windows, which also holds what else the machine did meanwhile.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.loggers import TensorBoardLogger

from benchmarks.moe import machine
from callbacks.divergence import Divergence
from callbacks.flight_recorder import FlightRecorder
from callbacks.gradient_health import GradientHealth
from callbacks.representation_collapse import RepresentationCollapse
from callbacks.signal_propagation import SignalPropagation
from callbacks.throughput import Throughput
from core import cli
from core.build import build

RUN = "runs/benchmark"
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
WINDOW, SAMPLED_EVERY = 10, 100  # steps; the second is the monitors' default
HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class Switch(L.Callback):
    """Hands the hooks on to the monitors whose turn it is, and times each window."""

    def __init__(self) -> None:
        logging = [Throughput(), GradientHealth(), FlightRecorder(RUN), Divergence(RUN)]
        self.kinds = [[], logging, [*logging, SignalPropagation(WINDOW), RepresentationCollapse(WINDOW)]]
        self.seconds: list[list[float]] = [[] for _ in self.kinds]
        self.inside: list[list[float]] = [[] for _ in self.kinds]
        self._started = self._spent = 0.0
        for hook in HOOKS:
            setattr(self, hook, lambda *arguments, hook=hook: self._hand_on(hook, *arguments))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for monitor in self.kinds[-1]:
            monitor.on_train_start(trainer, pl_module)

    def _hand_on(self, hook: str, trainer: L.Trainer, *arguments: Any) -> None:
        ended = hook == "on_train_batch_end"
        step = trainer.global_step if ended else trainer.global_step + 1
        kind = (step - 1) // WINDOW % len(self.kinds)
        if hook == "on_train_batch_start" and (step - 1) % WINDOW == 0:
            now = time.perf_counter()
            if step > WINDOW:
                self.seconds[kind - 1].append(now - self._started)
                self.inside[kind - 1].append(self._spent)
            self._started, self._spent = now, 0.0
        started = time.perf_counter()
        for monitor in self.kinds[kind]:
            getattr(monitor, hook)(trainer, *arguments)
        self._spent += time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", default=["experiment=moe_spannorm"], metavar="FIELD=VALUE")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("docs/results/monitoring-cpu.md"))
    arguments = parser.parse_args()
    cli.register_schemas()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", arguments.overrides)
    load = machine("cpu")
    torch.set_num_threads(arguments.threads)
    L.seed_everything(0, verbose=False)
    datamodule, switch = build(config, "data"), Switch()
    datamodule.prepare_data()
    module = build(config, "module", vocab_size=datamodule.vocab_size)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=(arguments.rounds + 1) * len(switch.kinds) * WINDOW + 1,
        gradient_clip_val=1.0,
        log_every_n_steps=WINDOW,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=TensorBoardLogger(RUN, name=""),
        callbacks=[switch],
    )
    trainer.fit(module, datamodule=datamodule)

    off, logged = (seconds[1:] for seconds in switch.seconds[:2])  # the first round warms up
    step = statistics.median(off) / WINDOW
    _, log, both = (statistics.median(seconds[1:]) for seconds in switch.inside)
    sample = both - log
    low, middle, high = statistics.quantiles([b - a for a, b in zip(off, logged, strict=True)], n=4)
    share = (log / WINDOW + sample / SAMPLED_EVERY) / step
    lines = [
        "# What the monitors cost\n",
        f"`python -m benchmarks.monitoring {' '.join(arguments.overrides)}`, {len(off)} rounds of 3 windows of "
        f"{WINDOW} steps.\ntorch {torch.__version__}; {load}.\n",
        "| | ms |\n|---|---|",
        f"| a step without monitors | {1e3 * step:.1f} |",
        f"| inside of the monitors, {WINDOW} steps of which one is logged | {1e3 * log:.1f} |",
        f"| and for one sample | {1e3 * sample:.1f} |",
        f"| by difference of windows, {WINDOW} steps of which one is logged: quartiles "
        f"| {1e3 * low:.1f}, {1e3 * middle:.1f}, {1e3 * high:.1f} |",
        f"| **on average, logged every {WINDOW} and sampled every {SAMPLED_EVERY} steps** | **{100 * share:.2f} %** |",
    ]
    print("\n".join(lines))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
