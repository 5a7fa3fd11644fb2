"""PreNorm is the architecture of Llama and Mixtral: with their weights the logits are theirs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lightning_modules.transformer import Transformer
from tests.support.models import VOCAB_SIZE, tiny_config, tokens

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "attn_implementation": "eager",
}
OURS: dict[str, Any] = {"placement": "prenorm", "norm_eps": 1e-3, "rope_theta": 500.0}


def randomize(model: nn.Module) -> None:
    """Weights under which a wrong norm, head order or router would show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.2)


def converted(theirs: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """The state dict of a Llama or Mixtral, by our names and in our layout."""
    ours = {
        "embedding.weight": theirs["model.embed_tokens.weight"],
        "head.weight": theirs["lm_head.weight"],
        f"blocks.{num_layers - 1}.placement.final_norm.weight": theirs["model.norm.weight"],
    }
    for i in range(num_layers):
        layer, block = f"model.layers.{i}", f"blocks.{i}"
        ours[f"{block}.placement.norm_attn.weight"] = theirs[f"{layer}.input_layernorm.weight"]
        ours[f"{block}.placement.norm_ffn.weight"] = theirs[f"{layer}.post_attention_layernorm.weight"]
        for name in "qkvo":
            ours[f"{block}.attn.{name}_proj.weight"] = theirs[f"{layer}.self_attn.{name}_proj.weight"]
        if f"{layer}.mlp.gate.weight" in theirs:
            gate, up = theirs[f"{layer}.mlp.experts.gate_up_proj"].chunk(2, dim=1)  # [experts, hidden, dim]
            down = theirs[f"{layer}.mlp.experts.down_proj"].transpose(1, 2)
            ours[f"{block}.ffn.router.layer.weight"] = theirs[f"{layer}.mlp.gate.weight"]
            for name, weight in (("w1", gate), ("v1", up), ("w2", down)):
                ours[f"{block}.ffn.experts.mlp.{name}"] = weight.flatten(0, 1)
        else:
            for name in ("gate", "up", "down"):
                ours[f"{block}.ffn.{name}_proj.weight"] = theirs[f"{layer}.mlp.{name}_proj.weight"]
    return ours


def assert_same_logits(theirs: nn.Module, ours: Transformer) -> None:
    randomize(theirs)
    ours.load_state_dict(converted(theirs.state_dict(), num_layers=2))
    batch = tokens(3, 17)
    with torch.no_grad():
        expected, actual = theirs.eval()(batch).logits, ours(batch)[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_dense_prenorm_is_llama(num_kv_heads: int, tied: bool) -> None:
    config = LlamaConfig(
        **COMMON, intermediate_size=48, num_key_value_heads=num_kv_heads, tie_word_embeddings=tied, pad_token_id=0
    )
    ours = Transformer(tiny_config(**OURS, num_kv_heads=num_kv_heads, tie_embeddings=tied), VOCAB_SIZE)
    assert_same_logits(LlamaForCausalLM(config), ours)


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_moe_prenorm_is_mixtral(num_kv_heads: int, backend: str) -> None:
    config = MixtralConfig(
        **COMMON,
        intermediate_size=24,
        num_key_value_heads=num_kv_heads,
        num_local_experts=4,
        num_experts_per_tok=2,
        experts_implementation="eager",
    )
    ours = Transformer(tiny_config(**OURS, num_kv_heads=num_kv_heads, ffn="moe", moe={"backend": backend}), VOCAB_SIZE)
    assert_same_logits(MixtralForCausalLM(config), ours)
