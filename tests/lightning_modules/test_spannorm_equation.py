"""SpanNorm's whole model against its equation, sublayers and all, written out from the weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.layers.rope import rope_tables
from lightning_modules.transformer import Block, Transformer
from tests.support import reference
from tests.support.models import VOCAB_SIZE, tiny_config, tokens

HEADS, KV_HEADS, EPS, THETA = 4, 2, 1e-5, 10000.0


def make_model(ffn: str, **options: Any) -> Transformer:
    config = tiny_config(
        placement="spannorm", placement_options=options, num_layers=3, ffn=ffn, num_kv_heads=KV_HEADS, norm_eps=EPS
    )
    model = Transformer(config, VOCAB_SIZE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.5, 1.5) if parameter.dim() == 1 else parameter.normal_(std=0.2)
    return model


def block_equation(block: Block, x: Tensor, first_norm: bool) -> Tensor:
    """Y = N(X + Attn(X')), out = N(X + FFN(Y)) for one sequence x [seq, dim]; X' = N0(X) with first_norm, else X."""
    gains = {name: parameter for name, parameter in block.placement.named_parameters()}
    attn, ffn = dict(block.attn.named_parameters()), dict(block.ffn.named_parameters())

    x_prime = reference.rms_norm(x, gains["first_norm.weight"], EPS) if first_norm else x
    y = reference.rms_norm(
        x + reference.attention(x_prime, attn, HEADS, KV_HEADS, THETA), gains["norm_attn.weight"], EPS
    )
    branch = reference.swiglu(y, ffn) if "gate_proj.weight" in ffn else reference.moe(y, ffn, 4, 2)
    return reference.rms_norm(x + branch, gains["norm_ffn.weight"], EPS)


@pytest.mark.parametrize("first_norm", [True, False])
@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_every_block_is_the_equation(ffn: str, first_norm: bool) -> None:
    model = make_model(ffn, first_norm=first_norm)
    rope = rope_tables(9, 8, THETA, torch.device("cpu"))
    for index, block in enumerate(model.blocks):
        x = 3 * torch.randn(2, 9, 32)  # not of unit variance, so that a missing norm shows
        expected = torch.stack([block_equation(block, sequence, first_norm and index == 0) for sequence in x])
        torch.testing.assert_close(block(x, rope)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("final_norm", [False, True])
def test_the_model_chains_the_equation_and_ends_without_a_norm_unless_asked(final_norm: bool) -> None:
    model = make_model("dense", final_norm=final_norm)
    sequence = tokens(9)
    x = model.embedding.weight[sequence]
    for index, block in enumerate(model.blocks):
        x = block_equation(block, x, first_norm=index == 0)
    if final_norm:
        x = reference.rms_norm(x, model.get_parameter("blocks.2.placement.final_norm.weight"), EPS)
    torch.testing.assert_close(model(sequence[None])[0][0], x @ model.head.weight.T, atol=1e-5, rtol=1e-5)
    assert sum("final_norm" in name for name, _ in model.named_parameters()) == final_norm


def test_the_default_is_a_first_norm_and_no_final_one() -> None:
    names = {name.split("placement.")[1] for name, _ in make_model("dense").named_parameters() if "placement" in name}
    assert names == {"first_norm.weight", "norm_attn.weight", "norm_ffn.weight"}
    assert sum("first_norm" in name for name, _ in make_model("dense").named_parameters()) == 1
