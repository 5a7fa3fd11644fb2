"""What a run will take, before anything is allocated: parameters, memory of a process, FLOPs, hours.

    python -m tools.plan experiment=dense_7b trainer=fsdp trainer.devices=8 trainer.num_nodes=2
    python -m tools.plan experiment=moe_spannorm_gpu --mfu 0.35 --peak-flops 312e12

Takes the same overrides as train.py. Weights, gradients and optimizer state are counted, activations are traced on
shapes (analysis/memory.py); what FSDP gathers is an upper bound. Not in it: the CUDA context, NCCL's buffers, and the
allocator's fragments. docs/scaling.md says how close it came to what was measured.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from analysis.memory import saved_activations
from core import cli
from core.build import build
from core.errors import require
from core.options import check_arguments
from core.parallel import num_models, num_passes
from lightning_modules.config import ModelConfig
from lightning_modules.cross_entropy import LARGE_VOCABULARY
from lightning_modules.layers.moe import MoE
from lightning_modules.sharding import check_mesh, check_unsharded
from lightning_modules.strategy import ShardedStrategy
from lightning_modules.transformer import Block, Transformer

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GIB = 2**30
CHECKED = ("max_steps", "accumulate_grad_batches", "precision")


class Mesh(NamedTuple):
    """How processes share a model.

    Attributes:
        data, tensor: numbers of data- and tensor-parallel processes.
        sharded: by FSDP2; else each process has all of it.
        reduced: by DDP, which copies the gradients into buckets.
    """

    data: int
    tensor: int
    sharded: bool
    reduced: bool


class Plan(NamedTuple):
    """Memory is in bytes, of one process; FLOPs are of training.

    Attributes:
        buckets: DDP's copies of the gradients.
        gathered: what FSDP has in full at a time: embedding and head, two blocks, and the gradients of one.
    """

    parameters: int
    active_parameters: int
    weights: int
    gradients: int
    buckets: int
    optimizer: int
    activations: int
    gathered: int
    flops_per_token: float
    tokens: int
    mesh: Mesh

    @property
    def memory(self) -> int:
        return self.weights + self.gradients + self.buckets + self.optimizer + self.activations + self.gathered

    def hours(self, mfu: float, peak_flops: float) -> float:
        """At this share of the devices' peak, which is in FLOP/s of one."""
        return self.flops_per_token * self.tokens / (mfu * peak_flops * self.mesh.data * self.mesh.tensor) / 3600


def plan(config: DictConfig) -> Plan:
    """Of a composed configuration.

    Raises:
        ConfigError: the model cannot be built, or training would refuse how it or the batch is shared out.
    """
    require(isinstance(config.trainer, DictConfig), "trainer", config.trainer, "a group with a _target_")
    trainer: Any = OmegaConf.to_container(config.trainer)
    check_arguments("trainer", L.Trainer, {name: value for name, value in trainer.items() if name in CHECKED})
    datamodule: Any = build(config, "data")
    module: Any = build(config, "module", vocab_size=datamodule.vocab_size)
    model: ModelConfig = module.model_config
    mesh, precision = find_mesh(config), str(config.trainer.precision)
    passes = num_passes(mesh.data * mesh.tensor, mesh.tensor, datamodule.batch_size, config.micro_batch_size)
    if mesh.sharded:
        check_mesh(model, mesh.data, mesh.tensor)
    else:
        check_unsharded(model)
    with torch.device("meta"):
        weightless = Transformer(model, datamodule.vocab_size)

    size = 2 if precision in ("bf16-true", "16-true") else 4
    held = num_held(weightless, mesh) * size
    saved = saved_activations(
        partial(Transformer, replace(model, activation_checkpointing=False, compile=False), datamodule.vocab_size),
        datamodule.batch_size // mesh.data // passes,
        datamodule.seq_len,
        datamodule.vocab_size >= LARGE_VOCABULARY,
        mesh.tensor,
        torch.bfloat16 if precision.endswith("-mixed") else None,
    )
    total, active = module.num_parameters
    sequences = config.trainer.accumulate_grad_batches * datamodule.batch_size
    return Plan(
        parameters=total,
        active_parameters=active,
        weights=held,
        gradients=held,
        buckets=held if mesh.reduced else 0,
        optimizer=2 * held,  # AdamW's two moments
        activations=saved.total(model.checkpoint_every if model.activation_checkpointing else None),
        gathered=num_gathered(weightless, mesh) * size,
        flops_per_token=weightless.flops_per_token(datamodule.seq_len),
        tokens=config.trainer.max_steps * sequences * datamodule.seq_len,
        mesh=mesh,
    )


def find_mesh(config: DictConfig) -> Mesh:
    """That of the configured trainer, on the devices that it names.

    Raises:
        ConfigError: it names none, or its strategy cannot be.
    """
    trainer = config.trainer
    valid = "an integer >= 1: plans have no devices"
    for name, number in (("devices", trainer.devices), ("num_nodes", trainer.get("num_nodes", 1))):
        require(isinstance(number, int) and number >= 1, f"trainer.{name}", number, valid)
    world = trainer.devices * trainer.get("num_nodes", 1)
    strategy = build(config, "trainer.strategy") if isinstance(trainer.get("strategy"), DictConfig) else None
    if isinstance(strategy, ShardedStrategy):
        tensor = strategy.tensor_parallel_size
        return Mesh(num_models(world, tensor), tensor, sharded=True, reduced=False)
    return Mesh(world, 1, sharded=False, reduced=strategy is not None or world > 1)


def num_held(model: Transformer, mesh: Mesh) -> int:
    """Parameters that a process keeps, of a weightless model."""
    cut = sum(num_cut(block) for block in model.blocks if isinstance(block, Block))
    whole = model.num_parameters()[0] - cut
    return (whole + cut // mesh.tensor) // (mesh.data if mesh.sharded else 1)


def num_gathered(model: Transformer, mesh: Mesh) -> int:
    """Parameters, and gradients of some, that a process has beyond those, for a time."""
    if not mesh.sharded or mesh.data == 1:
        return 0
    blocks = [num_of_block(block, model, mesh) for block in model.blocks if isinstance(block, Block)]
    rest = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.blocks.parameters())
    return rest + 3 * max(blocks)


def num_of_block(block: Block, model: Transformer, mesh: Mesh) -> int:
    """Parameters that are gathered for it: experts that are shared out stay where they are."""
    cut = num_cut(block)
    total = sum(p.numel() for p in block.parameters()) - cut + cut // mesh.tensor
    if isinstance(block.ffn, MoE) and model.config.moe.expert_parallel > 1:
        mlp: nn.Module = block.ffn.experts.mlp
        total -= sum(p.numel() for p in mlp.parameters())
    return total


def num_cut(block: Block) -> int:
    """Parameters that tensor parallelism would cut."""
    dense = block.ffn.shared_expert if isinstance(block.ffn, MoE) else block.ffn
    parts: list[Any] = [block.attn, *([dense] if dense is not None else [])]
    return sum(matrix.weight.numel() for part in parts for matrix in part.matrices())


def compose_config(overrides: Sequence[str]) -> DictConfig:
    cli.register_schemas()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", list(overrides))


def make_table(planned: Plan, mfu: float, peak_flops: float) -> Table:
    table = Table(box=box.SIMPLE, show_header=False)
    mesh, tokens = planned.mesh, planned.tokens
    kind = "sharded" if mesh.sharded else "whole in each"
    rows = {
        "processes": f"{mesh.data} data parallel x {mesh.tensor} tensor parallel, model {kind}",
        "parameters": f"{planned.parameters:,} ({planned.active_parameters:,} active)",
    }
    parts = ("weights", "gradients", "buckets", "optimizer", "activations", "gathered", "memory")
    for name in parts:
        label = "memory of a process" if name == "memory" else f"  {name}"
        rows[label] = f"{getattr(planned, name) / GIB:,.2f} GiB"
    rows["FLOPs per token"] = f"{planned.flops_per_token:.3e}"
    rows["tokens"] = f"{tokens:,} ({tokens / planned.active_parameters:,.1f} per active parameter)"
    rows["hours"] = f"{planned.hours(mfu, peak_flops):,.1f} at {mfu:.0%} of {peak_flops / 1e12:,.0f} TFLOP/s a device"
    for row in rows.items():
        table.add_row(*row)
    return table


def main(arguments: argparse.Namespace) -> None:
    require(0 < arguments.mfu <= 1, "--mfu", arguments.mfu, "a number in (0, 1]")
    require(arguments.peak_flops > 0, "--peak-flops", arguments.peak_flops, "a number > 0")
    console = Console()
    table = make_table(plan(compose_config(arguments.overrides)), arguments.mfu, arguments.peak_flops)
    Console(width=max(console.width, 100)).print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="as for train.py")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that the run reaches; default 0.4")
    parser.add_argument("--peak-flops", type=float, default=989e12, help="of a device; default: an H100's in bf16")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    cli.run(partial(main, parse_arguments()))
