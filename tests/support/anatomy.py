"""Held-out texts without a corpus, for tests of measures."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis.anatomy.text import Batch, Text
from datamodules.tokenizers import NumberTokenizer
from lightning_modules.transformer import Transformer
from spannorm import PLACEMENTS
from tests.support.models import VOCAB_SIZE, make_module

MODELS = [(name, "dense") for name in sorted(PLACEMENTS)] + [(name, "moe") for name in ("attnres", "mhc", "spannorm")]
"""Every placement, and what it is around."""


def make_text(batches: int = 2, sequences: int = 3, seq: int = 12, vocab_size: int = VOCAB_SIZE) -> Text:
    """Random tokens; every sequence but the first two is a document, and those are one."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(batches):
        tokens = torch.randint(vocab_size, (sequences, seq + 1), generator=generator)
        rows = torch.arange(sequences) + number * sequences
        documents = (rows - 1).clamp(min=0)[:, None].expand(-1, seq)
        made.append(Batch(tokens[:, :-1], tokens[:, 1:], None, documents.contiguous()))
    return Text(tuple(made), NumberTokenizer(vocab_size))


def trained_like(seed: int = 0, **fields: Any) -> Transformer:
    """A tiny model whose weights are larger than at initialization, so that every block does something."""
    torch.manual_seed(seed)
    model = make_module(**{"num_layers": 4, **fields}).model
    assert model is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    return model.eval()


class Nothing(nn.Module):
    """In the place of a sublayer."""

    def __init__(self, mixture: bool = False) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, x: Tensor, *rest: Any) -> Any:
        return (torch.zeros_like(x), None) if self.mixture else torch.zeros_like(x)


def without(model: Transformer, *numbers: int) -> Transformer:
    """The model with sublayers that put out zeros in these blocks, counted from 0."""
    changed = copy.deepcopy(model)
    for number in numbers:
        changed.blocks[number].attn, changed.blocks[number].ffn = Nothing(), Nothing(mixture=True)
    return changed


def in_order(model: Transformer, *numbers: int) -> Transformer:
    """The model with these of its blocks, counted from 0, in this order."""
    changed = copy.deepcopy(model)
    changed.blocks = nn.ModuleList(changed.blocks[number] for number in numbers)
    return changed


@torch.no_grad()
def loss_of(model: Transformer, text: Text) -> float:
    """Nats per token, of the model's own forward pass."""
    logits = torch.cat([model(batch.inputs)[0] for batch in text])
    return float(F.cross_entropy(logits.flatten(0, 1), torch.cat([batch.targets for batch in text]).flatten()))
