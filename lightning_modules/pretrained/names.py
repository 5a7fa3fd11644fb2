"""Tells which tensors of a folder of transformers are which parameters of ours, for reading and for writing."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.config import ModelConfig
from lightning_modules.pretrained.families import Family


class Entry(NamedTuple):
    """One parameter of ours.

    Attributes:
        ours: its name in a Transformer.
        theirs: the names of the tensors, one below the other, that it is; several of stacked experts.
        transposed: whether each of them is stored the other way round.
    """

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False

    def shape_of_theirs(self, shape: torch.Size) -> list[int]:
        """Return the shape that each of their tensors has, of our parameter's."""
        rows = [shape[0] // len(self.theirs), *shape[1:]]
        return rows[::-1] if self.transposed else rows

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield their tensors, of our parameter's values."""
        for name, part in zip(self.theirs, tensor.chunk(len(self.theirs)), strict=True):
            yield name, (part.t() if self.transposed else part).contiguous()


def entries(config: ModelConfig, family: Family) -> Iterator[Entry]:
    """Yield an entry for each parameter of a model, whose head comes last and is there also where it is tied.

    Args:
        config: a model that is one of the family.
        family: whose names are meant.
    """
    yield Entry("embedding.weight", ("model.embed_tokens.weight",))
    for i in range(config.num_layers):
        block, layer = f"blocks.{i}", f"model.layers.{i}"
        for ours, theirs in zip(("norm_attn", "norm_ffn"), family.norms, strict=True):
            yield Entry(f"{block}.placement.{ours}.weight", (f"{layer}.{theirs}.weight",))
        for name in "qkvo":
            yield Entry(f"{block}.attn.{name}_proj.weight", (f"{layer}.self_attn.{name}_proj.weight",))
        for name in "qkv" if family.qkv_bias else "":
            yield Entry(f"{block}.attn.{name}_proj.bias", (f"{layer}.self_attn.{name}_proj.bias",))
        for name in "qk" if family.qk_norm != "none" else "":
            yield Entry(f"{block}.attn.projection_norms.{name}.weight", (f"{layer}.self_attn.{name}_norm.weight",))
        if config.ffn == "moe" and config.moe.is_mixture(i + 1):
            yield from _mixture(block, f"{layer}.{family.mixture}", config.moe.num_experts, family)
        else:
            for name in ("gate_proj", "up_proj", "down_proj"):
                yield Entry(f"{block}.ffn.{name}.weight", (f"{layer}.mlp.{name}.weight",))
    yield Entry(f"blocks.{config.num_layers - 1}.placement.final_norm.weight", ("model.norm.weight",))
    yield Entry("head.weight", ("lm_head.weight",))


def _mixture(block: str, mixture: str, num_experts: int, family: Family) -> Iterator[Entry]:
    yield Entry(f"{block}.ffn.router.layer.weight", (f"{mixture}.gate.weight",))
    for ours, theirs in zip(("w1", "v1", "w2"), family.experts, strict=True):
        names = tuple(f"{mixture}.experts.{expert}.{theirs}.weight" for expert in range(num_experts))
        yield Entry(f"{block}.ffn.experts.mlp.{ours}", names, transposed=ours == "w2")
