"""Models small enough to be free, and their tokens."""

from typing import Any

import torch

from lightning_modules.config import ModelConfig, parse
from lightning_modules.language_module import LanguageModule

VOCAB_SIZE = 50


TINY: dict[str, Any] = {"dim": 32, "num_heads": 4, "num_layers": 2, "ffn_dim": 48, "norm_eps": 1e-5}


TINY_MOE: dict[str, Any] = {"num_experts": 4, "top_k": 2, "expert_dim": 24}


def tiny_values(**overrides: Any) -> dict[str, Any]:
    """Fields of a tiny ModelConfig as plain values; `moe` is merged with the tiny one's."""
    return {**TINY, **overrides, "moe": {**TINY_MOE, **overrides.get("moe", {})}}


def tiny_config(**overrides: Any) -> ModelConfig:
    """A ModelConfig of a few thousand parameters."""
    return parse(ModelConfig, "model", tiny_values(**overrides))


def make_module(optim: dict[str, Any] | None = None, **overrides: Any) -> LanguageModule:
    """A LanguageModule around a tiny model, built and initialized.

    Args:
        optim: fields of OptimConfig.
        overrides: fields of ModelConfig.
    """
    module = LanguageModule(tiny_values(**overrides), {"warmup_steps": 0, **(optim or {})}, VOCAB_SIZE)
    module.configure_model()
    return module


def tokens(*shape: int) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(VOCAB_SIZE, shape)


_TINY_SIZES = ["model.num_layers=1", "model.dim=16", "model.num_heads=2", "model.ffn_dim=24"]
TINY_MODELS = {
    "mixture": ["experiment=moe_spannorm", *_TINY_SIZES, "model.moe.num_experts=4"],
    "dense": ["experiment=dense_prenorm", *_TINY_SIZES],
}
"""Overrides of models for benchmarks that measure whole ones."""
