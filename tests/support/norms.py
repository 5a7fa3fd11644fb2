"""Norms of gradients by block and kind, written out."""

import math

from torch import Tensor

from callbacks.statistics import Group
from lightning_modules.transformer import Transformer
from tests.support.models import VOCAB_SIZE


def kind_of(name: str) -> Group:
    """The group of a parameter, told by its name: what the project itself never does."""
    if not name.startswith("blocks."):
        return Group(0, name.split(".")[0])
    kinds = {
        "attn_in": ("q_proj", "k_proj", "v_proj"),
        "attn_out": ("o_proj",),
        "ffn_up": ("gate_proj", "up_proj"),
        "ffn_down": ("down_proj",),
        "router": ("router",),
        "experts": ("w1", "v1", "w2"),
    }
    found = [kind for kind, words in kinds.items() if any(word in name.split(".") for word in words)]
    return Group(int(name.split(".")[1]) + 1, found[0] if found else "norm")


def norm_by_group(tensors: dict[str, Tensor]) -> dict[Group, float]:
    sums: dict[Group, float] = {}
    for name, tensor in tensors.items():
        group = kind_of(name)
        for value in tensor.detach().double().flatten().tolist():
            sums[group] = sums.get(group, 0.0) + value * value
    return {group: math.sqrt(total) for group, total in sums.items()}


def in_float64(model: Transformer) -> Transformer:
    double = Transformer(model.config, VOCAB_SIZE).double()
    double.load_state_dict(model.state_dict())
    return double
