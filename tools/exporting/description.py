"""Describes a model in config.json and generation_config.json, as every exported folder does."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_modules.trunk import Trunk


def sizes_of(model: Trunk) -> dict[str, Any]:
    """Return a model's sizes by the names that transformers has for them."""
    config = model.config
    known = {"vocab_size": model.embedding.num_embeddings} if isinstance(model.embedding, nn.Embedding) else {}
    return {
        **known,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
    }


def dtype_name(dtype: torch.dtype) -> str:
    """Return a type's name as config.json has it, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


def write_descriptions(folder: Path, described: dict[str, Any], ends: dict[str, int | None]) -> None:
    """Write config.json, and generation_config.json with the tokens that begin and end a text."""
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
