"""Measure where the time of a study's small runs goes, and what several of them as one model would gain.

    python -m benchmarks.small                 writes results/small-cpu.md

One thread. The model is that of the studies' laptop scale. The products of its blocks are computed by themselves, then
the whole step, then the same run by train.py with the monitors of a study; and several models as one, with a dimension
of their own before all others (torch.func.vmap), whose step is compared with theirs one after the other.
"""

import copy
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import check_counts, judged, machine, ratio, take_turns, timed
from core import cli
from core.build import build
from lightning_modules.composing import compose_run
from lightning_modules.layers.cpu_kernels.allocator import keep_freed_memory
from lightning_modules.transformer import Transformer

VOCAB_SIZE = 257
JOB = ["study_scale=laptop", "model.placement=spannorm", "model.init=scale_init"]
GAIN = 2.0
"""What several runs as one model have to gain to be worth a second way of training."""


@dataclass(frozen=True)
class SmallConfig:
    """Holds the fields that `python -m benchmarks.small` takes.

    Attributes:
        models: how many are one.
        steps: of the run by train.py.
        rounds: in each of which every way takes a step.
        job: overrides of the run.
        output: the report.
    """

    models: tuple[int, ...] = (2, 4, 8)
    steps: int = 60
    rounds: int = 7
    job: tuple[str, ...] = tuple(JOB)
    output: Path = Path("results/small-cpu.md")

    def __post_init__(self) -> None:
        check_counts(self, models=2, steps=2, rounds=1)


def make_model(job: tuple[str, ...], seed: int, kernels: str = "auto") -> Transformer:
    torch.manual_seed(seed)
    module: Any = build(compose_run([*job, f"model.cpu_kernels={kernels}"]), "module", vocab_size=VOCAB_SIZE)
    module.configure_model()
    model: Transformer = module.model
    return model


def products(model: Transformer, rows: int) -> tuple[Callable[[], None], int]:
    """Return what computes the products of the blocks' linear layers with their gradients, and its FLOPs."""
    sizes = [tuple(m.weight.shape) for m in model.blocks.modules() if isinstance(m, torch.nn.Linear)]
    made = [(torch.randn(rows, n), torch.randn(m, n), torch.randn(rows, m)) for m, n in sizes]

    def step() -> None:
        for x, weight, gradient in made:
            x @ weight.t()
            gradient @ weight
            gradient.t() @ x

    return step, sum(6 * rows * m * n for m, n in sizes)


def one(model: Transformer, tokens: Tensor) -> Callable[[], None]:
    """Return a training step of a model, as train.py takes it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        model(tokens[:, :-1], targets=tokens[:, 1:])[0].mean.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def losses_of(models: list[Transformer], tokens: Tensor) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """Return the parameters of several models as one's, and what computes their losses [models].

    Args:
        models: without kernels for CPUs, which vmap does not know.
        tokens: [models, batch, seq + 1].
    """
    stacked, buffers = stack_module_state(models)
    parameters = {name: value.detach().requires_grad_() for name, value in stacked.items()}
    plain = copy.deepcopy(models[0]).to("meta")

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], tokens: Tensor) -> Tensor:
        logits = functional_call(plain, (parameters, buffers), (tokens[:, :-1],))[0]
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def losses() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # of the other one vmap computes a model at a time
            return vmap(loss)(parameters, buffers, tokens)

    return list(parameters.values()), losses


def several(models: list[Transformer], tokens: Tensor) -> Callable[[], None]:
    """Return a training step of several models as one; see losses_of."""
    parameters, losses = losses_of(models, tokens)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    def step() -> None:
        losses().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def by_train(job: tuple[str, ...], steps: int) -> tuple[float, list[int]]:
    """Return the seconds of a step by train.py with all monitors, and [batch, seq] of its batches."""
    with tempfile.TemporaryDirectory() as folder:
        lengths = [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}", "data.val_batches=1"]
        command = [sys.executable, str(Path(__file__).resolve().parents[1] / "train.py"), *job, *lengths]
        subprocess.run([*command, f"run_dir={folder}/run"], check=True, capture_output=True)
        summary = json.loads(Path(folder, "run/summary.json").read_text())
    data = compose_run(list(job)).data
    return summary["tokens"] / steps / summary["tokens_per_second"], [data.batch_size, data.seq_len]


@cli.tool
def main(settings: SmallConfig) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    trained, (batch, seq) = by_train(settings.job, settings.steps)
    tokens = torch.randint(VOCAB_SIZE, (max(settings.models), batch, seq + 1))
    model = make_model(settings.job, 0)
    multiply, flops = products(model, batch * seq)
    step_alone = timed(one(model, tokens[0]))
    seconds = take_turns({"products": timed(multiply), "step": step_alone}, settings.rounds)
    share, step = ratio(seconds["products"], seconds["step"]), statistics.median(seconds["step"])
    multiplying = f"the products of its blocks alone, {flops / (step * share) / 1e9:.0f} GFLOP/s"
    rates = [f"| {1e3 * taken:.1f} | {batch * seq / taken:,.0f} |" for taken in (step, trained)]
    lines = [
        "# Many small runs\n",
        f"`python -m benchmarks.small`, medians of {settings.rounds} rounds; {machine('cpu')}.\n",
        "| of a step of the studies' laptop scale, one core | ms | tokens/s |\n|---|---|---|",
        f"| {multiplying} | {1e3 * step * share:.1f} | |",
        f"| forward, backward, optimizer {rates[0]}",
        f"| the same by train.py, each step logged and every monitor {rates[1]}\n",
        f"Products are {100 * share:.0f} % of the step. train.py takes {trained / step:.2f} times as long as that.\n",
        "| models as one (torch.func.vmap) | times as fast as one after the other |\n|---|---|",
    ]
    gains = []
    for number in settings.models:
        models = [make_model(settings.job, seed, "off") for seed in range(number)]
        beside = take_turns({"step": step_alone, "several": timed(several(models, tokens[:number]))}, settings.rounds)
        gains.append(number / ratio(beside["several"], beside["step"]))
        lines.append(f"| {number} | {gains[-1]:.2f} |")
    lines.append(f"\nGoal {GAIN:g} times, or it is not worth a second way of training: {judged(max(gains) >= GAIN)}.")
    print("\n".join(lines))
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    settings.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    cli.run(main)
