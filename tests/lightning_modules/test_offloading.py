"""accelerate brings a module's weights in around that module's forward: whoever reads them elsewhere reads nothing."""

from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from lightning_modules.transformer import Transformer
from spannorm import PLACEMENTS
from tests.support.models import VOCAB_SIZE, tiny_config, tokens

SHARED = {"num_experts": 8, "num_shared_experts": 1, "first_dense_layers": 1, "balancing": "bias", "score": "sigmoid"}
MODELS: dict[str, dict[str, Any]] = {
    **{name: {"placement": name, "ffn": "moe"} for name in PLACEMENTS},
    "dense, layernorm": {"norm": "layernorm"},
    "dyt": {"norm": "dyt", "placement": "prenorm"},
    "gatednorm": {"norm": "gatednorm", "placement": "hybridnorm"},
    "shared experts and a bias": {"ffn": "moe", "moe": SHARED},
}


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_offloaded_weights_give_the_same_logits(overrides: dict[str, Any]) -> None:
    model, text = Transformer(tiny_config(**overrides), VOCAB_SIZE).eval(), tokens(2, 9)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    expected, _ = model(text)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in model.parameters())
    assert torch.equal(model(text)[0], expected)
