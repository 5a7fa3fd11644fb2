"""Count what a run will take, before anything is allocated: parameters, memory of a process, FLOPs, hours.

    python -m tools.plan experiment=dense_7b trainer=fsdp trainer.devices=8 trainer.num_nodes=2
    python -m tools.plan experiment=moe_spannorm_gpu mfu=0.35 peak_flops=312e12
    python -m tools.plan experiment=dense_7b trainer=fsdp trainer.devices=8 assumed_vocab_size=32768  # no corpus yet
    python -m tools.plan experiment=moe_spannorm_gpu device_gb=80            # and the micro batch that fits

Takes the same overrides as train.py, and plans for GPUs unless they say trainer.accelerator=cpu. Weights, gradients and
optimizer state are counted, activations and the peak of a step are traced on shapes (analysis/memory.py); what FSDP
gathers is an upper bound.
Hours are arithmetic: an H100's peak in the run's precision, times mfu. Not in the memory: the CUDA context, NCCL's
buffers, and the allocator's fragments. docs/scaling.md says how close it came to what was measured.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import lightning as L
import torch
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from analysis.memory import peak_of_step, saved_activations
from core import cli
from core.build import build, of_data
from core.dataclass_cli import OVERRIDES
from core.errors import ConfigError, UserError, lookup, require
from core.limits import require_at_most
from core.options import check_arguments
from core.parallel import num_models, num_passes
from datamodules.index import MAX_VOCABULARY
from lightning_modules.composing import compose_run
from lightning_modules.config import ModelConfig
from lightning_modules.layers.moe import MoE
from lightning_modules.optimizers import state_sizes
from lightning_modules.sharding import check_mesh, check_unsharded
from lightning_modules.strategy import ShardedStrategy
from lightning_modules.trunk import Block, Trunk

GIB = 2**30
USABLE = 0.9
"""Of a device's memory: the rest is left to CUDA's context, NCCL's buffers and the allocator's fragments."""
CHECKED = ("max_steps", "accumulate_grad_batches", "precision")


@dataclass(frozen=True)
class PlanConfig:
    """Holds the fields that `python -m tools.plan` takes.

    Attributes:
        overrides: the overrides of the run, as for train.py.
        mfu: the share of the peak that the run reaches.
        peak_flops: FLOP/s of a device in the run's precision; null: an H100's, 989e12 in bf16 and fp16, 495e12 in fp32,
            or 67e12 with float32_matmul_precision=highest.
        assumed_vocab_size: the vocabulary of a corpus that is not prepared yet; null: that of the data.
        device_gb: the memory of a device, in GB of 10^9 bytes: say the largest micro_batch_size for nine tenths of it.
    """

    overrides: tuple[str, ...] = field(default=(), metadata=OVERRIDES)
    mfu: float = 0.4
    peak_flops: float | None = None
    assumed_vocab_size: int | None = field(default=None, metadata={"formerly": "vocab_size"})
    device_gb: float | None = None

    def __post_init__(self) -> None:
        peak, vocab_size = self.peak_flops, self.assumed_vocab_size
        require(0 < self.mfu <= 1, "mfu", self.mfu, "a number in (0, 1]")
        require(peak is None or 0 < peak < math.inf, "peak_flops", peak, "a number > 0")
        require(vocab_size is None or vocab_size >= 2, "assumed_vocab_size", vocab_size, "an integer >= 2")
        require_at_most(MAX_VOCABULARY, "assumed_vocab_size", vocab_size)
        device = self.device_gb
        require(device is None or 0 < device < math.inf, "device_gb", device, "a number > 0, in GB")


class Precision(NamedTuple):
    """Says what a value of trainer.precision means.

    Attributes:
        weights: dtype of weights, gradients and the optimizer's state.
        autocast: dtype that matrix products are cast to; None: that of the weights.
        peak_flops: FLOP/s of an H100 (SXM), dense, in NVIDIA's data sheet; of fp32 in TF32, as train.py sets it.
    """

    weights: torch.dtype
    autocast: torch.dtype | None
    peak_flops: float


PRECISIONS = {
    "64-true": Precision(torch.float64, None, 67e12),
    "32-true": Precision(torch.float32, None, 495e12),
    "16-mixed": Precision(torch.float32, torch.float16, 989e12),
    "bf16-mixed": Precision(torch.float32, torch.bfloat16, 989e12),
    "16-true": Precision(torch.float16, None, 989e12),
    "bf16-true": Precision(torch.bfloat16, None, 989e12),
}
WITHOUT_TF32 = 67e12
"""In the place of 495e12, with float32_matmul_precision=highest."""
SHORT = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "None": "32-true"}  # Lightning's


class Mesh(NamedTuple):
    """Says how processes share a model.

    Attributes:
        data, tensor: numbers of data- and tensor-parallel processes.
        sharded: by FSDP2; else each process has all of it.
        reduced: by DDP, which copies the gradients into buckets.
        halved: whether FSDP2 gathers the blocks' weights in bfloat16.
    """

    data: int
    tensor: int
    sharded: bool
    reduced: bool
    halved: bool = False


class Plan(NamedTuple):
    """Memory is in bytes, of one process; FLOPs are of training.

    Attributes:
        buckets: DDP's copies of the gradients.
        activations: what the forward pass keeps for the backward pass; with recomputed blocks, and one of these.
        peak: the most that gradients and activations take at once, gradients of activations included. Gradients of
            parameters come as activations go, unless several passes add to them.
        gathered: what FSDP has in full at a time: embedding and head, two blocks, and the gradients of one.
        precision: a key of PRECISIONS.
        compiled: whether torch.compile makes the blocks' kernels; what it fuses away is not known.
        host_copies: of an optimizer step, for which a GPU and its host wait: in other precisions than bf16
            F.grouped_mm fetches the ends of the experts' rows, for three products forward, again where a block is
            recomputed, and six backward.
        position: what `tokens` counts, and `flops_per_token` is of, in a word.
    """

    parameters: int
    active_parameters: int
    weights: int
    gradients: int
    buckets: int
    optimizer: int
    activations: int
    peak: int
    gathered: int
    flops_per_token: float
    tokens: int
    mesh: Mesh
    precision: str
    compiled: bool
    host_copies: int
    position: str

    @property
    def memory(self) -> int:
        return self.weights + self.buckets + self.optimizer + self.peak + self.gathered

    def hours(self, mfu: float, peak_flops: float) -> float:
        """Return the hours at this share of the devices' peak, which is in FLOP/s of one."""
        return self.flops_per_token * self.tokens / (mfu * peak_flops * self.mesh.data * self.mesh.tensor) / 3600


def plan(config: DictConfig, vocab_size: int | None = None) -> Plan:
    """Return the plan of a composed configuration.

    Args:
        config: as `compose_config` returns it.
        vocab_size: that of a corpus which is not prepared yet; None: the configured data's own.

    Raises:
        ConfigError: the model cannot be built, training would refuse how it or the batch is shared out, or its data are
            not here and no vocab_size was given.
    """
    require(isinstance(config.trainer, DictConfig), "trainer", config.trainer, "a group with a _target_")
    # Resolved, as the Trainer gets them: ${on_gpu:...} is no precision.
    check_arguments("trainer", L.Trainer, {name: config.trainer[name] for name in CHECKED if name in config.trainer})
    datamodule: Any = build(config, "data")
    module: Any = build(config, "module", **of_data(config, partial(_of, datamodule, vocab_size), "data"))
    model: ModelConfig = module.model_config
    name, mesh = precision_name(config), find_mesh(config)
    precision = lookup("trainer.precision", name, PRECISIONS)
    passes = num_passes(mesh.data * mesh.tensor, mesh.tensor, datamodule.batch_size, config.micro_batch_size)
    if mesh.sharded:
        check_mesh(model, mesh.data, mesh.tensor)
    else:
        check_unsharded(model)
    weightless = module.weightless()
    positions = weightless.count(weightless.example(1, getattr(datamodule, "seq_len", 1))).positions

    size = precision.weights.itemsize
    held, (total, active) = num_held(weightless, mesh) * size, module.num_parameters
    every = model.activation_checkpoint_every if model.activation_checkpointing else None
    model = replace(model, compile=False)
    batch = (datamodule.batch_size // mesh.data // passes, positions, module.loss_is_chunked)

    def activations(cut: int) -> int:
        plain = replace(model, activation_checkpointing=False)
        build = partial(module.make_model, plain)
        return saved_activations(build, *batch, cut, precision.autocast, precision.weights).total(every)

    kept = activations(mesh.tensor)
    # Where matrices are cut, what is sent between processes is not traced; all gradients, for their part, are counted.
    accumulated = passes * config.trainer.accumulate_grad_batches > 1 or mesh.tensor > 1
    peak = peak_of_step(
        partial(module.make_model, model),
        *batch,
        precision.autocast,
        precision.weights,
        kept_of_gradients=held / (total * size),
        accumulated=accumulated,
    )
    looped = not name.startswith("bf16") and model.moe.backend in ("auto", "grouped")
    mixtures = weightless.mixtures() if looped and config.trainer.accelerator != "cpu" else ()
    fetches = sum(12 if every is not None and number % every == 0 else 9 for number in mixtures)
    if mesh.tensor > 1:  # what lives shorter than activations is taken as if it were not cut
        peak -= activations(1) - kept
    sequences = config.trainer.accumulate_grad_batches * datamodule.batch_size
    return Plan(
        parameters=total,
        active_parameters=active,
        weights=held,
        gradients=held,
        buckets=held if mesh.reduced else 0,
        optimizer=num_kept(weightless, state_sizes(weightless, module.optim_config), mesh) * size,
        activations=kept,
        peak=peak,
        gathered=gathered_bytes(weightless, mesh, size),
        flops_per_token=weightless.flops_per_token(positions),
        tokens=config.trainer.max_steps * sequences * positions,
        mesh=mesh,
        precision=name,
        compiled=module.model_config.compile,
        host_copies=fetches * passes * config.trainer.accumulate_grad_batches,
        position=module.task.position,
    )


def largest_micro_batch(config: DictConfig, device_gb: float, vocab_size: int | None = None) -> int | None:
    """Return the most sequences that a device takes at once in USABLE of its memory; None: not even one.

    Args:
        config: as for `plan`; its micro_batch_size does not count.
        device_gb: the device's memory, in GB of 10^9 bytes.
        vocab_size: as for `plan`.
    """
    share = config.data.batch_size // find_mesh(config).data
    # From above: the whole share at once may take less than two parts, as no gradients wait for the second.
    for size in (size for size in range(share, 0, -1) if share % size == 0):
        tried = config.copy()
        tried.micro_batch_size = size
        if plan(tried, vocab_size).memory <= USABLE * device_gb * 1e9:
            return size
    return None


def _of(datamodule: Any, vocab_size: int | None, name: str) -> Any:
    """Return what the module takes of the data by this name; of a corpus that is not here, what was given instead."""
    if name != "vocab_size":
        return getattr(datamodule, name, None)
    try:
        return vocab_size or getattr(datamodule, name, None)
    except UserError as error:
        valid = f"the size of the vocabulary that the data will have, as they are not here ({error})"
        raise ConfigError("assumed_vocab_size", None, valid) from error


def precision_name(config: DictConfig) -> str:
    """Return a key of PRECISIONS, or what else trainer.precision is."""
    # Resolved, as the Trainer gets them: ${on_gpu:...} is no precision.
    given = str(config.trainer.precision)
    return SHORT.get(given, given)


def find_mesh(config: DictConfig) -> Mesh:
    """Return that of the configured trainer, on the devices that it names.

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
        strategy.check_precision(precision_name(config))
        halved = strategy.param_dtype == "bfloat16"
        return Mesh(num_models(world, tensor), tensor, sharded=True, reduced=False, halved=halved)
    return Mesh(world, 1, sharded=False, reduced=strategy is not None or world > 1)


def num_held(model: Trunk, mesh: Mesh) -> int:
    """Return how many parameters of a weightless model a process keeps."""
    cut = sum(num_cut(block) for block in model.blocks if isinstance(block, Block))
    whole = model.num_parameters()[0] - cut
    return (whole + cut // mesh.tensor) // (mesh.data if mesh.sharded else 1)


def num_kept(model: Trunk, sizes: Mapping[Tensor, int], mesh: Mesh) -> int:
    """Return how many numbers the optimizer of a weightless model keeps in a process, of `state_sizes` in all."""
    cut = sum(
        sizes.get(weight, 0) for block in model.blocks if isinstance(block, Block) for weight in cut_weights(block)
    )
    return (sum(sizes.values()) - cut + cut // mesh.tensor) // (mesh.data if mesh.sharded else 1)


def gathered_bytes(model: Trunk, mesh: Mesh, size: int) -> int:
    """Return how many bytes of weights and gradients a process has beyond its own for a time.

    They are embedding and head, the weights of two blocks, and the gradients of one.

    Args:
        model: without weights.
        mesh: which processes share it.
        size: bytes of a weight.
    """
    if not mesh.sharded or mesh.data == 1:
        return 0
    blocks = [num_of_block(block, model, mesh) for block in model.blocks if isinstance(block, Block)]
    rest = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.blocks.parameters())
    return size * rest + max(blocks) * (2 * (2 if mesh.halved else size) + size)


def num_of_block(block: Block, model: Trunk, mesh: Mesh) -> int:
    """Return how many parameters are gathered for a block: experts that are shared out stay where they are."""
    cut = num_cut(block)
    total = sum(p.numel() for p in block.parameters()) - cut + cut // mesh.tensor
    if isinstance(block.ffn, MoE) and model.config.moe.expert_parallel > 1:
        mlp: nn.Module = block.ffn.experts.mlp
        total -= sum(p.numel() for p in mlp.parameters())
    return total


def num_cut(block: Block) -> int:
    """Return how many parameters tensor parallelism would cut."""
    return sum(weight.numel() for weight in cut_weights(block))


def cut_weights(block: Block) -> Iterator[Tensor]:
    """Yield the weights that tensor parallelism would cut."""
    dense = block.ffn.shared_expert if isinstance(block.ffn, MoE) else block.ffn
    parts: list[Any] = [block.attn, *([dense] if dense is not None else [])]
    yield from (matrix.weight for part in parts for matrix in part.matrices() if matrix.role != "residual")


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Return the configuration that train.py would have of these overrides on a machine with GPUs."""
    config = compose_run(overrides)
    if config.trainer.accelerator == "auto":
        config.trainer.accelerator = "gpu"  # ${on_gpu:...} would look for those of this machine
    return config


def make_table(planned: Plan, mfu: float, peak_flops: float) -> Table:
    table = Table(box=box.SIMPLE, show_header=False)
    mesh, tokens = planned.mesh, planned.tokens
    kind = "sharded" if mesh.sharded else "whole in each"
    rows = {
        "processes": f"{mesh.data} data parallel x {mesh.tensor} tensor parallel, model {kind}",
        "parameters": f"{planned.parameters:,} ({planned.active_parameters:,} active)",
        "precision": f"{planned.precision}, {'compiled' if planned.compiled else 'not compiled'}",
    }
    labels = {"peak": "  gradients and activations at once", "memory": "memory of a process"}
    for name in ("weights", "gradients", "buckets", "optimizer", "activations", "gathered", "peak", "memory"):
        label = labels.get(name, f"  {name}")
        rows[label] = f"{getattr(planned, name) / GIB:,.2f} GiB"
    if planned.host_copies:
        rows["copies to the host"] = f"{planned.host_copies:,} a step: grouped products; in bf16 an H100 has none"
    rows[f"FLOPs per {planned.position}"] = f"{planned.flops_per_token:.3e}"
    rows[f"{planned.position}s"] = f"{tokens:,} ({tokens / planned.active_parameters:,.1f} per active parameter)"
    rows["hours"] = f"{planned.hours(mfu, peak_flops):,.1f} at {mfu:.0%} of {peak_flops / 1e12:,.0f} TFLOP/s a device"
    for row in rows.items():
        table.add_row(*row)
    return table


@cli.tool
def main(config: PlanConfig) -> None:
    console = Console()
    composed = compose_config(config.overrides)
    planned = plan(composed, config.assumed_vocab_size)
    exact = planned.precision == "32-true" and composed.float32_matmul_precision == "highest"
    peak_flops = WITHOUT_TF32 if exact else PRECISIONS[planned.precision].peak_flops
    table = make_table(planned, config.mfu, config.peak_flops or peak_flops)
    if config.device_gb is not None:
        size = largest_micro_batch(composed, config.device_gb, config.assumed_vocab_size)
        table.add_row(f"fits into {config.device_gb:g} GB", f"micro_batch_size={size}" if size else "not one sequence")
    Console(width=max(console.width, 100)).print(table)


if __name__ == "__main__":
    cli.run(main)
