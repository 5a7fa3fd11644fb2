"""Folders that transformers writes: small random models of every family that is read."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from datamodules.preparation.bpe import train_bpe
from tests.support.runs import TEXT

ODD: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 51,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
"""Sizes of which none divides another that it need not divide."""

OF_FAMILY: dict[str, dict[str, Any]] = {
    "Llama": {"head_dim": 6},
    "Mistral": {"head_dim": 6, "sliding_window": None},
    "Qwen2": {},
    "Qwen3": {"head_dim": 6},
    "Olmo2": {},
    "Mixtral": {"head_dim": 6, "num_local_experts": 5, "num_experts_per_tok": 2},
    "Olmoe": {"num_experts": 5, "num_experts_per_tok": 3},
    "Qwen3Moe": {"head_dim": 6, "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 22},
}


def randomize(model: nn.Module) -> None:
    """Weights under which a tensor that is forgotten, or in another's place, shows: no gain is 1, and no bias 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.uniform_(0.5, 1.5)
                if name.endswith("bias"):
                    parameter.sub_(1.0)


def make(family: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A model of transformers in eval mode; its attention and experts are the plain ones."""
    values = {**ODD, **OF_FAMILY[family], **fields}
    config = getattr(transformers, f"{family}Config")(**values)
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    randomize(model)
    return model.to(dtype).eval()


def saved(folder: Path, family: str, dtype: torch.dtype = torch.float32, shard: str = "1GB", **fields: Any) -> Any:
    """The same, saved in the folder."""
    model = make(family, dtype, **fields)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def edit(folder: Path, **fields: Any) -> None:
    """Change fields of a folder's config.json; None leaves a field out."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def add_tokenizer(folder: Path, size: int = 300, end: str = "</s>") -> None:
    """Put a byte-level BPE of so many tokens into the folder, whose texts end with a token of this name."""
    content = train_bpe([TEXT], size).decode().replace("<|endoftext|>", end)
    (folder / "tokenizer.json").write_text(content)
    named = {"eos_token": end, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
