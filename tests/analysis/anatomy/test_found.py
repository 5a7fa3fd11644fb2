"""What is wrong with a model is found: a dead block, a block twice, a block that undoes the one before."""

import json
import math
from typing import Any

import pytest
import torch

from analysis.anatomy.contribution import Contribution
from analysis.anatomy.layer_drop import LayerDrop
from analysis.anatomy.pruning import Pruning
from analysis.anatomy.registry import MEASURES
from analysis.anatomy.similarity import Similarity
from core.errors import ConfigError
from tests.support.anatomy import KINDS, MODELS, data_of, inputs_of, loss_of, make_text, of_kind, trained_like, without

DEAD = 2  # counted from 1


def with_a_dead_block(kind: str = "text", **fields: Any) -> Any:
    model = of_kind(kind, num_layers=4, **fields)
    with torch.no_grad():
        for matrix in (*model.blocks[DEAD - 1].attn.matrices(), *model.blocks[DEAD - 1].ffn.matrices()):
            if matrix.role in ("attn_out", "ffn_down"):
                matrix.weight.zero_()
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("placement", "ffn"), MODELS)
def test_a_dead_block_is_found_under_every_placement(placement: str, ffn: str, kind: str) -> None:
    model, text = with_a_dead_block(kind, placement=placement, ffn=ffn), data_of(kind, batches=1)
    drops = LayerDrop()(model, text).curves["drop_by_block"].values
    added = Contribution()(model, text).curves["contribution_by_block"].values
    for values in (drops, added):
        assert values[DEAD - 1] == pytest.approx(0, abs=1e-6)
        assert all(abs(value) > 2e-5 for number, value in enumerate(values, 1) if number != DEAD)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_block_is_the_first_to_be_pruned_and_changes_nothing(kind: str) -> None:
    model, text = with_a_dead_block(kind, placement="prenorm"), data_of(kind)
    pruned = Pruning(tolerance=1e-3)(model, text)
    assert pruned.curves["pruned_from"].values[0] == DEAD
    assert pruned.curves["pruning_by_count"].values[0] == pytest.approx(0, abs=1e-6)
    assert pruned.scalars["spare_blocks"] >= 1
    similar = Similarity()(model, text)
    assert similar.curves["block_influence_by_block"].values[DEAD - 1] == pytest.approx(0, abs=1e-6)
    assert similar.matrices["cka"][DEAD - 1][DEAD] == pytest.approx(1, abs=1e-6)


def test_a_block_that_stands_twice_changes_places_with_itself() -> None:
    model, text = trained_like(placement="prenorm"), make_text()
    model.blocks[2].load_state_dict(model.blocks[1].state_dict())
    swaps = LayerDrop()(model, text).curves["swap_by_block"].values
    assert swaps[1] == pytest.approx(0, abs=1e-6)
    assert min(abs(swaps[0]), abs(swaps[2])) > 1e-3


def test_pruning_leaves_out_the_blocks_that_turn_the_state_least() -> None:
    model, text = trained_like(placement="spannorm"), make_text()
    found = Pruning(skip="identity")(model, text)
    angles = torch.tensor(Similarity()(model, text).matrices["angular_distance"])
    for count, first in enumerate(found.curves["pruned_from"].values, start=1):
        assert first == 1 + int(angles.diagonal(count).argmin())
    first = int(found.curves["pruned_from"].values[0])
    drops = LayerDrop(skip="identity")(model, text).curves["drop_by_block"].values
    assert found.curves["pruning_by_count"].values[0] == pytest.approx(drops[first - 1], abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", ["spannorm", "mhc", "attnres"])
def test_blocks_are_pruned_by_the_placements_own_skip(placement: str, kind: str) -> None:
    """And as many can be spared as cost less than is tolerated, each time."""
    model, text = of_kind(kind, placement=placement), data_of(kind)
    found, loss = Pruning()(model, text), loss_of(model, text)
    expected = []
    for count, first in enumerate(found.curves["pruned_from"].values, start=1):
        left_out = range(int(first) - 1, int(first) - 1 + count)
        expected.append(loss_of(without(model, *left_out), text) - loss)
    assert found.curves["pruning_by_count"].values == pytest.approx(expected, abs=1e-4)
    for tolerance in (1e-9, *(abs(value) + 1e-3 for value in expected)):
        spare = 0
        while spare < 4 and expected[spare] < tolerance:
            spare += 1
        assert Pruning(tolerance=tolerance)(model, text).scalars["spare_blocks"] == spare


def test_a_tolerance_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="tolerance=0 is not valid: expected a number > 0"):
        Pruning(tolerance=0)


def test_contribution_is_what_is_added_beside_the_skip() -> None:
    """PreNorm's by hooks: attention's and FFN's output over the state before."""
    model, text = trained_like(placement="prenorm"), make_text(batches=1)
    outputs: dict[str, list[Any]] = {"attn": [], "ffn": [], "before": []}
    for block in model.blocks:
        block.attn.register_forward_hook(lambda module, inputs, output: outputs["attn"].append(output))
        block.ffn.register_forward_hook(lambda module, inputs, output: outputs["ffn"].append(output[0]))
        block.register_forward_pre_hook(lambda module, inputs: outputs["before"].append(inputs[0]))
    with torch.no_grad():
        model(inputs_of(text.batches[0]))
    ratios = [
        ((a + f).norm(dim=-1) / before.norm(dim=-1)).mean()
        for a, f, before in zip(outputs["attn"], outputs["ffn"], outputs["before"], strict=True)
    ]
    found = Contribution()(model, text)
    assert found.curves["contribution_by_block"].values == pytest.approx([float(r) for r in ratios], rel=1e-4)
    early, late = (ratios[0] + ratios[1]) / 2, (ratios[2] + ratios[3]) / 2
    assert found.scalars["late_contribution"] == pytest.approx(float(late / early), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name, measure in MEASURES.items() if not measure.slow])
def test_a_model_that_overflowed_is_measured_as_no_number(name: str, kind: str) -> None:
    measure, text = MEASURES[name](), data_of(kind, batches=1)
    model = of_kind(kind)
    if measure.lacks(model) is not None:
        model = of_kind(kind, ffn="moe")
    with torch.no_grad():
        model.blocks[1].attn.o_proj.weight[0, 0] = float("nan")
    found = measure(model, text)
    content = json.dumps(found.as_plain(), allow_nan=False)
    assert "null" in content
    of_weights = {"expert_cosine"}  # of which none is the one that is no number
    assert {name for name in measure.outcomes if not math.isnan(found.scalars.get(name, math.nan))} <= of_weights
