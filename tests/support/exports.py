"""Exported folders of small models, for the tests of what transformers does with them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.build import build
from tools import export


class OwnNorm(nn.Module):
    """A norm kind of a user's own that takes, and uses, all that the library fills in."""

    def __init__(self, dim: int, eps: float, before_attention: bool, width: int) -> None:
        super().__init__()
        self.factor, self.eps = (1 + 0.1 * before_attention) * dim / width, eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps) * self.factor


def remade(first: Path, folder: Path, **model: Any) -> Path:
    """The run with another model, of random weights under which a wrong norm or order would show; not trained."""
    from omegaconf import OmegaConf

    config: Any = OmegaConf.load(first / "config.yaml")
    for part in (config.model, config.module.model):
        part.merge_with(OmegaConf.create(model))
    module = build(config, "module", vocab_size=257)
    module.configure_model()
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    (folder / "checkpoints").mkdir(parents=True)
    OmegaConf.save(config, folder / "config.yaml")
    content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "global_step": 7}
    torch.save(content, folder / "checkpoints/last.ckpt")
    return folder


def exported(folder: Path, output: Path) -> str:
    """Export a run; returns what the tool says."""
    return export.export(export.ExportConfig(folder, output))


def loaded(output: Path, **options: Any) -> Any:
    """The exported model in eval mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True, **options).eval()


def tokenizer_of(output: Path, side: str = "right") -> Any:
    """The exported tokenizer, which pads with the token that ends a text, on this side."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(output, trust_remote_code=True, padding_side=side)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
