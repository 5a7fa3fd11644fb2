"""bfloat16 against a model that is cast by hand, and whole logits."""

import copy

import pytest
import torch
import torch.nn.functional as F

from analysis.anatomy.bfloat16 import Bfloat16
from spannorm import PLACEMENTS
from tests.support.anatomy import inputs_of, make_text, trained_like


@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_against_whole_logits(ffn: str) -> None:
    model, text = trained_like(ffn=ffn, num_layers=2), make_text()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = Bfloat16()(model, text)
    inputs, targets = (torch.cat([of(batch) for batch in text]) for of in (inputs_of, lambda batch: batch.targets))
    with torch.no_grad():
        exact, _ = model(inputs)
        rounded, _ = copy.deepcopy(model).to(torch.bfloat16)(inputs)
    assert rounded.dtype == torch.bfloat16
    p, q = (logits.float().flatten(0, 1) for logits in (exact, rounded))
    more = F.cross_entropy(q, targets.flatten()) - F.cross_entropy(p, targets.flatten())
    divergence = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="batchmean", log_target=True)
    same = (p.argmax(-1) == q.argmax(-1)).float().mean()
    expected = {"bf16": more.item(), "bf16_kl": divergence.item(), "bf16_same": same.item()}
    assert found.scalars == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert found.scalars["bf16_kl"] > 0
    for name, value in found.scalars.items():
        assert found.by_document[name].sum() / text.num_targets == pytest.approx(value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("placement", sorted(PLACEMENTS))
def test_of_every_placement(placement: str) -> None:
    found = Bfloat16()(trained_like(placement=placement, num_layers=2), make_text(1))
    assert 0 < found.scalars["bf16_kl"] < 1
