"""Small mixtures and their inputs."""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.layers.moe import MoE
from tests.support.models import tiny_config

BACKENDS = ["loop", "grouped"]


def make_moe(inner_norm: bool = False, **moe: Any) -> MoE:
    layer = MoE(tiny_config(ffn="moe", moe=moe), inner_norm)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 1.5) if parameter.dim() == 1 else parameter.normal_(std=0.3)
    return layer


def send_all_to(layer: MoE, expert: int) -> None:
    """Router weights by which a token whose first feature is 1 goes to one expert."""
    with torch.no_grad():
        layer.router.layer.weight[:, 0] = -50.0
        layer.router.layer.weight[expert, 0] = 50.0


def inputs(*shape: int) -> Tensor:
    x = torch.randn(*shape, 32)
    x[..., 0] = 1.0
    return x.requires_grad_()
