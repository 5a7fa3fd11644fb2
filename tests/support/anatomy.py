"""Held-out texts and images without a corpus, for tests of measures."""

import copy
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis.anatomy.held_out import Batch, HeldOut
from datamodules.tokenizers import NumberTokenizer
from lightning_modules.transformer import Transformer
from lightning_modules.trunk import Asked, Trunk
from lightning_modules.vision_module import VisionModule
from lightning_modules.vision_transformer import ImageConfig, VisionTransformer
from spannorm import PLACEMENTS
from tests.support import images
from tests.support.models import VOCAB_SIZE, make_module

MODELS = [(name, "dense") for name in sorted(PLACEMENTS)] + [(name, "moe") for name in ("attnres", "mhc", "spannorm")]
"""Every placement, and what it is around."""
KINDS = ("text", "images")
M = TypeVar("M", bound=Trunk)
IMAGES = replace(images.IMAGES, num_classes=7)
POOLED = replace(IMAGES, positions="rope", pool="mean", patch_size=4)
"""Images of 17 positions of which the first is read, and of 4 of which the mean is."""


def make_text(batches: int = 2, sequences: int = 3, seq: int = 12, vocab_size: int = VOCAB_SIZE) -> HeldOut:
    """Random tokens; every sequence but the first two is a document, and those are one."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(batches):
        tokens = torch.randint(vocab_size, (sequences, seq + 1), generator=generator)
        rows = torch.arange(sequences) + number * sequences
        documents = (rows - 1).clamp(min=0)[:, None].expand(-1, seq).contiguous()
        made.append(text_batch(tokens, documents))
    return HeldOut(tuple(made), NumberTokenizer(vocab_size))


def text_batch(tokens: Tensor, documents: Tensor, positions: Tensor | None = None) -> Batch:
    """Of sequences [batch, seq + 1], each of whose tokens is to follow those before it."""
    targets = tokens[:, 1:]
    rows = {"tokens": tokens} if positions is None else {"tokens": tokens, "positions": positions}
    return Batch(rows, documents, Asked(targets, torch.arange(targets.size(1)).expand_as(targets)))


def inputs_of(batch: Batch) -> Tensor:
    """The tokens that a model reads, [batch, seq]."""
    return batch.rows["tokens"][:, :-1]


def make_images(batches: int = 2, number: int = 4, config: ImageConfig = IMAGES) -> HeldOut:
    """Images of independent pixels with random classes; each is a document."""
    generator, made = torch.Generator().manual_seed(1), []
    for first in range(0, batches * number, number):
        pixels = torch.randn(number, 1, 8, 8, generator=generator)
        rows = {"images": pixels, "labels": torch.randint(config.num_classes, (number,), generator=generator)}
        documents = torch.arange(first, first + number)[:, None].expand(-1, config.num_positions)
        targets = rows["labels"][:, None]
        made.append(Batch(rows, documents, Asked(targets, torch.zeros_like(targets))))
    return HeldOut(tuple(made), task=VisionModule.task)


def trained_like(seed: int = 0, **fields: Any) -> Transformer:
    """A tiny model whose weights are larger than at initialization, so that every block does something."""
    torch.manual_seed(seed)
    model = make_module(**{"num_layers": 4, **fields}).model
    assert model is not None
    return enlarged(model)


def of_images(seed: int = 0, config: ImageConfig = IMAGES, **fields: Any) -> VisionTransformer:
    """The same of images."""
    torch.manual_seed(seed)
    return enlarged(images.make_images_model(config, **{"num_layers": 4, **fields}))


def of_kind(kind: str, seed: int = 0, **fields: Any) -> Any:
    """The same of a text, or of images."""
    return trained_like(seed, **fields) if kind == "text" else of_images(seed, **fields)


def data_of(kind: str, batches: int = 2, samples: int = 3) -> HeldOut:
    """Data for it."""
    return make_text(batches, samples) if kind == "text" else make_images(batches, samples)


def enlarged(model: M) -> M:
    """A model with weights as they may be after training."""
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


def without(model: M, *numbers: int) -> M:
    """The model with sublayers that put out zeros in these blocks, counted from 0."""
    changed = copy.deepcopy(model)
    for number in numbers:
        changed.blocks[number].attn, changed.blocks[number].ffn = Nothing(), Nothing(mixture=True)
    return changed


def in_order(model: M, *numbers: int) -> M:
    """The model with these of its blocks, counted from 0, in this order."""
    changed = copy.deepcopy(model)
    changed.blocks = nn.ModuleList(changed.blocks[number] for number in numbers)
    return changed


@torch.no_grad()
def loss_of(model: Any, data: HeldOut) -> float:
    """Nats per token, or per image, of the model's own forward pass."""
    logits = [model(batch.rows["images"] if "images" in batch.rows else inputs_of(batch))[0] for batch in data]
    targets = [batch.rows["labels"] if "images" in batch.rows else batch.rows["tokens"][:, 1:] for batch in data]
    return float(F.cross_entropy(torch.cat(logits).flatten(0, -2), torch.cat(targets).flatten()))
