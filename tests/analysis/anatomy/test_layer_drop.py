"""The loss without blocks, against models in which these blocks are not there."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis.anatomy.layer_drop import LayerDrop
from analysis.anatomy.text import Text
from lightning_modules.transformer import Transformer
from tests.support.anatomy import MODELS, make_text, trained_like


class Nothing(nn.Module):
    """In the place of a sublayer."""

    def __init__(self, mixture: bool = False) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, x: Tensor, *rest: Any) -> Any:
        return (torch.zeros_like(x), None) if self.mixture else torch.zeros_like(x)


def without(model: Transformer, *numbers: int) -> Transformer:
    """The model with sublayers that put out zeros in these blocks."""
    changed = copy.deepcopy(model)
    for number in numbers:
        changed.blocks[number].attn, changed.blocks[number].ffn = Nothing(), Nothing(mixture=True)
    return changed


@torch.no_grad()
def loss_of(model: Transformer, text: Text) -> float:
    logits = torch.cat([model(batch.inputs)[0] for batch in text])
    return float(F.cross_entropy(logits.flatten(0, 1), torch.cat([batch.targets for batch in text]).flatten()))


@pytest.mark.parametrize(("placement", "ffn"), MODELS)
def test_a_block_left_out_is_one_whose_sublayers_put_out_zeros(placement: str, ffn: str) -> None:
    model, text = trained_like(placement=placement, ffn=ffn, num_layers=3), make_text()
    found = LayerDrop()(model, text)
    loss = loss_of(model, text)
    assert found.scalars["loss"] == pytest.approx(loss, abs=1e-5)
    expected = [loss_of(without(model, number), text) - loss for number in range(3)]
    assert found.curves["drop_by_block"].values == pytest.approx(expected, abs=1e-4)
    assert found.scalars["layer_drop"] == pytest.approx(np.mean(expected), abs=1e-4)
    cut = [loss_of(without(model, *range(3 - k, 3)), text) - loss for k in (1, 2, 3)]
    assert found.curves["cut_by_count"].values == pytest.approx(cut, abs=1e-4)
