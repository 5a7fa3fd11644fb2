"""PreNorm as Hugging Face has it: Llama where it is dense, Mixtral where it is a mixture of experts."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.config import ModelConfig
from lightning_modules.transformer import Transformer


def obstacle(model: Transformer) -> str | None:
    """Return what neither Llama nor Mixtral has, in words; None: the model is one of them."""
    config, moe = model.config, model.config.moe
    differences = {
        f"placement {config.placement}": config.placement != "prenorm",
        "placement_options": bool(config.placement_options),
        f"norm {config.norm}": config.norm != "rmsnorm",
        "a multiplier on the logits of tied embeddings": config.tie_embeddings and model.output_multiplier != 1,
    }
    if config.ffn == "moe":
        differences |= {
            "shared experts": moe.num_shared_experts > 0,
            "dense layers among the mixtures": len(model.mixtures()) < config.num_layers,
            f"router scores by {moe.score}": moe.score != "softmax",
            "a bias in the selection of experts": moe.balancing == "bias",
            "expert weights that are not normalized": not moe.normalizes_weights,
        }
    return next((name for name, differs in differences.items() if differs), None)


def to_hugging_face(model: Transformer, max_length: int, end_of_document: int | None) -> Any:
    """Return a LlamaForCausalLM or MixtralForCausalLM with the same logits.

    A Mixtral's router_aux_loss_coef weighs the load-balancing loss as the run did: transformers' is top_k times ours.
    It has no z-loss, and it takes the loss over all layers' tokens together, where ours is the mean over the layers.

    Args:
        model: one without an `obstacle`.
        max_length: tokens in a sequence of its training.
        end_of_document: the token that ends a text, and stands before one; None: there is none.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    config = model.config
    common: dict[str, Any] = {
        "vocab_size": model.embedding.num_embeddings,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": max_length,
        "bos_token_id": end_of_document,
        "eos_token_id": end_of_document,
        "pad_token_id": None,
    }
    theirs: Any
    if config.ffn == "moe":
        common.update(num_local_experts=config.moe.num_experts, num_experts_per_tok=config.moe.top_k)
        common.update(router_aux_loss_coef=config.moe.balance_weight / config.moe.top_k)
        theirs = MixtralForCausalLM(MixtralConfig(**common, intermediate_size=config.expert_hidden_dim))
    else:
        theirs = LlamaForCausalLM(LlamaConfig(**common, intermediate_size=config.hidden_dim))
    theirs.load_state_dict(_by_their_names(model))
    return theirs


def save(converted: Any, folder: Path) -> None:
    """Write what `to_hugging_face` made; rope_theta where transformers 5 reads it, and where 4 does."""
    converted.save_pretrained(folder)
    path = folder / "config.json"
    for weights in folder.glob("*.safetensors"):  # which safetensors makes for their owner alone
        shutil.copymode(path, weights)
    written = json.loads(path.read_text())
    written["rope_theta"] = written["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def _by_their_names(model: Transformer) -> dict[str, Tensor]:
    ours, config = model.state_dict(), model.config
    theirs = {
        "model.embed_tokens.weight": ours["embedding.weight"],
        "model.norm.weight": ours[f"blocks.{config.num_layers - 1}.placement.final_norm.weight"],
        "lm_head.weight": ours["head.weight"] * model.output_multiplier,
    }
    for i in range(config.num_layers):
        block = {name.removeprefix(f"blocks.{i}."): w for name, w in ours.items() if name.startswith(f"blocks.{i}.")}
        layer = {
            "input_layernorm.weight": block["placement.norm_attn.weight"],
            "post_attention_layernorm.weight": block["placement.norm_ffn.weight"],
            **{f"self_attn.{name}_proj.weight": block[f"attn.{name}_proj.weight"] for name in "qkvo"},
            **(_mixture(block, config) if config.ffn == "moe" else _dense(block)),
        }
        theirs.update((f"model.layers.{i}.{name}", weight) for name, weight in layer.items())
    return theirs


def _dense(block: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"mlp.{name}_proj.weight": block[f"ffn.{name}_proj.weight"] for name in ("gate", "up", "down")}


def _mixture(block: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return our matrices [experts x hidden, dim] as theirs, [experts, 2 hidden, dim] and [experts, dim, hidden]."""
    w1, v1, w2 = (
        block[f"ffn.experts.mlp.{name}"].unflatten(0, (config.moe.num_experts, -1)) for name in ("w1", "v1", "w2")
    )
    return {
        "mlp.gate.weight": block["ffn.router.layer.weight"],
        "mlp.experts.gate_up_proj": torch.cat((w1, v1), dim=1),
        "mlp.experts.down_proj": w2.transpose(1, 2),
    }
