"""A model that is one of transformers' own architectures, written as such: Llama, Qwen, OLMo, Mixtral."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.atomic_write import save_tensors
from lightning_modules.config import ModelConfig
from lightning_modules.pretrained.families import FAMILIES, Family
from lightning_modules.pretrained.names import entries
from lightning_modules.transformer import Transformer
from spannorm import find_placement
from tools.exporting.description import dtype_name, sizes_of, write_descriptions
from tools.exporting.folded_weights import folded_weights


def find_family(model: Transformer) -> Family | str:
    """Return the architecture that a model is; if none, what the most similar one has not, in words."""
    alike = [family for family in FAMILIES.values() if (family.mixture is not None) == (model.config.ffn == "moe")]
    found = [(family, _differences(model, family)) for family in alike]
    nearest, differences = min(found, key=lambda pair: len(pair[1]))
    return differences[0] if differences else nearest


def write(
    model: Transformer,
    family: Family,
    folder: Path,
    max_length: int,
    end_of_document: int | None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write config.json, generation_config.json and model.safetensors.

    A mixture's router_aux_loss_coef weighs the load-balancing loss as the run did: transformers' is top_k times ours.
    It has no z-loss, and it takes the loss over all layers' tokens together, where ours is the mean over the layers.

    Args:
        model: one of the family.
        family: as `find_family` says.
        folder: exists.
        max_length: tokens in a sequence of its training.
        end_of_document: the token that ends a text, and stands before one; None: there is none.
        dtype: of the weights.
    """
    ends = {"bos_token_id": end_of_document, "eos_token_id": end_of_document}
    described = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **_configuration(model, family),
        "max_position_embeddings": max_length,
        **ends,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": dtype_name(dtype),
    }
    write_descriptions(folder, described, ends)
    tensors = {name: tensor.to(dtype) for name, tensor in _weights(model, family).items()}
    save_tensors(tensors, folder / "model.safetensors", {"format": "pt"})


def _differences(model: Transformer, family: Family) -> list[str]:
    config, moe = model.config, model.config.moe
    differences = {
        f"placement {config.placement}": config.placement != family.placement,
        "placement_options": bool(config.placement_options),
        f"norm {config.norm}": config.norm != "rmsnorm",
        "a multiplier on the logits of tied embeddings": config.tie_embeddings and model.output_multiplier != 1,
        f"qk_norm {_qk_norm(config)}": _qk_norm(config) != family.qk_norm,
        f"qkv_bias {config.qkv_bias}": config.qkv_bias != family.qkv_bias,
        "biases on all projections": config.bias,
        f"ffn {config.ffn}": config.ffn == "mlp",
        "attention that sees later tokens": not config.causal,
        "heads that are wider together than the model": family.model_type == "olmoe" and _has_other_heads(config),
    }
    if family.mixture is not None:
        differences |= {
            "shared experts": moe.num_shared_experts > 0,
            "dense layers among the mixtures": len(model.mixtures()) < config.num_layers and not family.dense_layers,
            f"router scores by {moe.score}": moe.score != "softmax",
            "a bias in the selection of experts": moe.balancing == "bias",
            "expert weights that are not normalized": family.normalizes is True and not moe.normalizes_weights,
        }
    return [name for name, differs in differences.items() if differs]


def _has_other_heads(config: ModelConfig) -> bool:
    return config.attention_width != config.dim  # OLMoE's norms on q and k have the model's width


def _qk_norm(config: ModelConfig) -> str:
    """Return the norms on q and k that there are, the placement's own included."""
    if config.qk_norm != "none":
        return config.qk_norm
    declared = find_placement(config.placement).qkv_norm
    return "none" if declared is None else "head" if declared.per_head else "width"


def _configuration(model: Transformer, family: Family) -> dict[str, Any]:
    config, moe = model.config, model.config.moe
    described: dict[str, Any] = {
        **sizes_of(model),
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        # Where transformers 4 reads it, and where 5 does.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
    }
    if family.mixture is None:
        return described
    described |= {
        "num_local_experts" if family.model_type == "mixtral" else "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        family.expert_dim: config.expert_hidden_dim,
        "router_aux_loss_coef": moe.balance_weight / moe.top_k,
    }
    if family.normalizes is None:
        described["norm_topk_prob"] = moe.normalizes_weights
    if family.dense_layers:
        dense = set(range(1, config.num_layers + 1)) - model.mixtures().keys()
        described |= {"decoder_sparse_step": 1, "mlp_only_layers": sorted(layer - 1 for layer in dense)}
    return described


def _weights(model: Transformer, family: Family) -> dict[str, Tensor]:
    ours, found = folded_weights(model), dict[str, Tensor]()
    for entry in entries(model.config, family):
        tensor = ours[entry.ours]
        if entry.ours == "head.weight":
            if model.config.tie_embeddings:
                continue
            tensor = tensor * model.output_multiplier
        found.update(entry.split(tensor))
    return found
