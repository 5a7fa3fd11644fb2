"""What holds of every measure: all stays as it was, no figure hangs on the batches, intervals are of the figures."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from analysis.anatomy.findings import Findings
from analysis.anatomy.held_out import HeldOut
from analysis.anatomy.lens import TunedLens
from analysis.anatomy.measure import Comparison
from analysis.anatomy.registry import INSTRUMENTS
from tests.support.anatomy import KINDS, data_of, of_kind


@pytest.mark.parametrize("name", sorted(INSTRUMENTS.keys() - {"critical_batch_size"}))  # which wants a run
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_callers_is_moved(name: str, kind: str) -> None:
    model, text = of_kind(kind, ffn="moe", num_layers=2), data_of(kind, batches=1)
    text = dataclasses.replace(text, fitting=text.batches)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    measure: Any = TunedLens(steps=2) if name == "tuned_lens" else INSTRUMENTS[name]()
    models = (model, of_kind(kind, 1, ffn="moe", num_layers=2)) if isinstance(measure, Comparison) else (model,)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert measure.lacks(*models) is None
    measure(*models, text)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def found_by(name: str, text: HeldOut, kind: str) -> Findings:
    measure: Any = TunedLens(steps=3, targets=20) if name == "tuned_lens" else INSTRUMENTS[name]()
    if hasattr(measure, "positions"):
        measure = dataclasses.replace(measure, positions=20)  # every fifth token: batches do not end with one
    models = [of_kind(kind, seed, ffn="moe") for seed in (0, 1)]
    return measure(*models[: 1 + isinstance(measure, Comparison)], text)  # type: ignore[no-any-return]


def cut(text: HeldOut, *sizes: int) -> HeldOut:
    """The same sequences in batches of these sizes."""
    (whole,) = text.batches
    stops = list(itertools.accumulate(sizes))
    parts = (whole.part(stop - size, stop) for size, stop in zip(sizes, stops, strict=True))
    return dataclasses.replace(text, batches=tuple(parts))


OF_BATCHES = {"activation_ratio", "activation_ratio_by_block"}
"""Of medians, of which it takes the mean over batches."""


@pytest.mark.parametrize("name", sorted(INSTRUMENTS.keys() - {"critical_batch_size", "sharpness"}))
@pytest.mark.parametrize("kind", KINDS)
def test_no_figure_hangs_on_the_batches(name: str, kind: str) -> None:
    """Seven samples side by side, and in batches of which the last is the smallest, as a text's last one is."""
    text = data_of(kind, batches=1, samples=7)
    text = dataclasses.replace(text, fitting=text.batches)
    together, apart = (found_by(name, made, kind).as_plain() for made in (text, cut(text, 3, 3, 1)))
    assert together["scalars"].keys() == apart["scalars"].keys()
    for key in together["scalars"].keys() - OF_BATCHES:
        assert apart["scalars"][key] == pytest.approx(together["scalars"][key], rel=1e-3, abs=1e-5), key
    for key, curve in together["curves"].items():
        if key not in OF_BATCHES:
            assert apart["curves"][key]["values"] == pytest.approx(curve["values"], rel=1e-3, abs=1e-5), key
    for kind in ("matrices", "by_document"):
        for key, rows in together[kind].items():
            for ours, theirs in zip(apart[kind][key], rows, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4), key


WITH_INTERVALS = {
    "layer_drop": {"loss", "layer_drop", "late_drop", "drop_by_block", "swap_by_block", "cut_by_count"},
    "pruning": {"pruning_by_count"},
    "lens": {"lens_divergence_by_depth", "lens_overlap_by_depth", "lens_loss_by_depth"},
    "tuned_lens": {"tuned_divergence_by_depth", "tuned_overlap_by_depth", "tuned_loss_by_depth"},
    "outliers": {"kurtosis", "kurtosis_by_block", "sink", "sink_by_block"},
    "quantization": {"w8a8", "w4a16", "w4a4"},
    "bfloat16": {"bf16", "bf16_kl", "bf16_same"},
    "expert_drop": {"expert_drop", "expert_drop_by_mixture"},
    "routing_agreement": {"routing_agreement", "routing_agreement_by_mixture"},
}
"""Figures that are means over targets or positions, whose documents can be drawn anew."""
OF_TEXT = {"sink", "sink_by_block", "sink_heads", "sink_uniform", "kind_information"}
"""Figures that say something of tokens, or of attention that sees what came before."""


@pytest.mark.parametrize("name", sorted(INSTRUMENTS.keys() - {"critical_batch_size"}))
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_found_is_what_is_drawn_and_resampled(name: str, kind: str) -> None:
    text, of_text = data_of(kind), OF_TEXT if kind == "images" else set()
    found = found_by(name, dataclasses.replace(text, fitting=text.batches), kind)
    expected = set(INSTRUMENTS[name].outcomes) - {"preconditioned_sharpness"}  # which wants a run
    assert expected - of_text <= found.scalars.keys()
    assert not found.scalars.keys() & of_text
    assert found.by_document.keys() == WITH_INTERVALS.get(name, set()) - of_text
    for key, sums in found.by_document.items():
        values = [found.scalars[key]] if key in found.scalars else found.curves[key].values
        counts = found.counts.get(key, text.targets_by_document)
        assert (sums.sum(1) / counts.sum()).tolist() == pytest.approx(values, abs=1e-9), key
    for picture in found.pictures:
        assert set(picture.of) <= (found.curves if picture.kind == "curves" else found.matrices).keys()
