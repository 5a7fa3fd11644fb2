"""Attention and dense FFN cut over processes that have the same tokens (1909.08053): torch's own parallel styles.

    q, k, v, gate, up    by outputs: each process has some of the heads, or of the hidden units
    o, down              by inputs: the sum over the processes is the output

Around the two the stream is whole and the same in all these processes, so norms, routers, experts, embedding and head
compute what one process would, and a placement's forward never knows: its norms and matrices are whole in every
process. Norms inside the two see a part of their input: those over a single head have their gradients added up, and
those over all of it get it together.
"""

from inspect import signature
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    RowwiseParallel,
    parallelize_module,
)

from lightning_modules.layers.attention import Attention
from lightning_modules.layers.moe import MoE


class NormOfParts(PrepareModuleInputOutput):
    """A norm that all processes have, with its gates if it has any, and of whose input each has a part.

    Args:
        kept: how the input is shared out among the processes, and the output again.
        computed: how the norm gets it.
    """

    def __init__(self, kept: Placement, computed: Placement) -> None:
        super().__init__(
            input_layouts=kept,
            desired_input_layouts=computed,
            output_layouts=computed,
            desired_output_layouts=kept,
        )

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return super()._apply(distribute_module(module, device_mesh), device_mesh)


WHOLE_INPUT = NormOfParts(Shard(-1), Replicate())
"""A norm over features of which each process has a part: it gets all, and leaves each its part."""
HEADS = NormOfParts(Shard(2), Shard(2))
"""A norm over each head by itself: its input is [batch, seq, heads, head_dim]."""


def apply_tensor_parallel(block: Any, mesh: DeviceMesh) -> None:
    """Cut a block's attention and dense FFN over the mesh's processes, in place.

    Args:
        block: a Block, with the same weights in every process.
        mesh: those processes, of one dimension.
    """
    _cut_attention(block.attn, mesh)
    ffn = block.ffn.shared_expert if isinstance(block.ffn, MoE) else block.ffn
    if ffn is not None:
        plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
        there = {name: style for name, style in plan.items() if hasattr(ffn, name)}
        _apply(ffn, mesh, {**there, "inner_norm": WHOLE_INPUT})
        parallelize_module(ffn, mesh, _shared_input(ffn))


def _cut_attention(attention: Attention, mesh: DeviceMesh) -> None:
    plan: dict[str, ParallelStyle] = {f"{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {"o_proj": RowwiseParallel(), "inner_norm": WHOLE_INPUT}
    for name, each_head in attention.norms_each_head.items():
        plan[f"projection_norms.{name}"] = HEADS if each_head else WHOLE_INPUT
    _apply(attention, mesh, plan)
    parallelize_module(attention, mesh, _shared_input(attention))


def _shared_input(module: nn.Module) -> PrepareModuleInput:
    """Return the first input, which is the same in all processes, with a gradient that is summed over them once."""
    by_position = [one for one in signature(module.forward).parameters.values() if one.kind is not one.KEYWORD_ONLY]
    layouts = (Replicate(), *[None] * (len(by_position) - 1))
    return PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)


def _apply(module: nn.Module, mesh: DeviceMesh, plan: dict[str, ParallelStyle]) -> None:
    """Apply each style to its submodule, leaving out norms that are not there."""
    there = {name: style for name, style in plan.items() if not isinstance(module.get_submodule(name), nn.Identity)}
    parallelize_module(module, mesh, there, src_data_rank=None)  # all have the same weights: nothing is sent
