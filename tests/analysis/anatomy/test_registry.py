"""What holds of every measure: it leaves the model and the random numbers of its caller as they were."""

import dataclasses
from typing import Any

import pytest
import torch

from analysis.anatomy.lens import TunedLens
from analysis.anatomy.measure import Comparison
from analysis.anatomy.registry import INSTRUMENTS
from tests.support.anatomy import make_text, trained_like


@pytest.mark.parametrize("name", sorted(INSTRUMENTS.keys() - {"critical_batch_size"}))  # which wants a run
def test_nothing_of_the_callers_is_moved(name: str) -> None:
    model, text = trained_like(ffn="moe", num_layers=2), make_text(batches=1)
    text = dataclasses.replace(text, fitting=text.batches)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    measure: Any = TunedLens(steps=2) if name == "tuned_lens" else INSTRUMENTS[name]()
    models = (model, trained_like(1, ffn="moe", num_layers=2)) if isinstance(measure, Comparison) else (model,)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert measure.lacks(*models) is None
    measure(*models, text)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not model.training
