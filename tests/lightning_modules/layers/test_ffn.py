"""The dense feed-forward layers against their equations, and where their biases start."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from core.errors import ConfigError
from lightning_modules.layers.attention import Attention
from lightning_modules.layers.ffn import MLP, FeedForward
from tests.support import reference
from tests.support.models import tiny_config

EQUATIONS: dict[type[FeedForward] | type[MLP], Callable[..., Tensor]] = {
    FeedForward: reference.swiglu,
    MLP: reference.mlp,
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", EQUATIONS)
def test_the_layer_is_its_equation(kind: type[FeedForward] | type[MLP], bias: bool) -> None:
    layer, x = kind(tiny_config(bias=bias)), torch.randn(2, 5, 32)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    weights = dict(layer.named_parameters())
    assert any(name.endswith("bias") for name in weights) == bias
    torch.testing.assert_close(layer(x)[0], EQUATIONS[kind](x, weights), atol=1e-5, rtol=1e-5)


def test_an_mlp_is_four_times_as_wide_as_the_model_unless_it_is_told_otherwise() -> None:
    assert tiny_config(ffn="mlp", ffn_dim=None).hidden_dim == 4 * 32
    assert tiny_config(ffn="mlp", ffn_dim=20).hidden_dim == 20


@pytest.mark.parametrize("layer", [Attention, FeedForward, MLP])
def test_biases_start_at_zero(layer: type[Attention] | type[FeedForward] | type[MLP]) -> None:
    biases = [p for name, p in layer(tiny_config(bias=True)).named_parameters() if name.endswith("bias")]
    assert len(biases) == {Attention: 4, FeedForward: 3, MLP: 2}[layer]
    assert not any(bias.any() for bias in biases)


def test_experts_have_no_biases() -> None:
    with pytest.raises(ConfigError, match=r"model\.bias=True is not valid: expected false with model\.ffn=moe"):
        tiny_config(ffn="moe", bias=True)
