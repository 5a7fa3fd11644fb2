"""Massive dimensions that are planted and found; sinks and kurtosis written down a second time."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from analysis.anatomy.held_out import Batch
from analysis.anatomy.outliers import Outliers
from core.errors import ConfigError
from lightning_modules.transformer import Transformer
from spannorm import PLACEMENTS
from tests.support.anatomy import inputs_of, make_text, text_batch, trained_like
from tests.support.reference import turn


def with_a_massive_dimension(dimension: int, number: int = 2) -> Transformer:
    """A PreNorm model of which one block writes a number into one dimension, which no later block takes out again."""
    model = trained_like(placement="prenorm", num_layers=4)
    with torch.no_grad():
        model.blocks[number - 1].ffn.down_proj.weight[dimension] *= 1e4
        for block in model.blocks[number:]:
            for weight in (block.attn.o_proj.weight, block.ffn.down_proj.weight):
                weight *= 0.1
    return model


def test_a_massive_dimension_is_found() -> None:
    found = Outliers(ratio=500)(with_a_massive_dimension(7), make_text())
    assert found.scalars["persistent_dimensions"] == 1
    assert found.curves["massive_dimensions_by_block"].values == [0, 1, 1, 1]
    assert found.curves["activation_dimension_by_block"].values[1:] == [7, 7, 7]
    (note,) = found.notes
    assert note.startswith("Dimension 7 is massive after blocks 2-4: up to ")


def test_what_lasts_over_half_of_the_blocks_persists() -> None:
    for number, persistent in ((3, 1), (4, 0)):
        found = Outliers(ratio=500)(with_a_massive_dimension(7, number), make_text())
        assert found.curves["massive_dimensions_by_block"].values == [0] * (number - 1) + [1] * (5 - number)
        assert found.scalars["persistent_dimensions"] == persistent


def test_the_largest_activation_is_held_against_the_median_one() -> None:
    model, text = trained_like(placement="prenorm", num_layers=3), make_text(batches=2)
    by_block: list[list[Tensor]] = [[], [], []]
    for block, states in zip(model.blocks, by_block, strict=True):
        block.placement.register_forward_hook(lambda module, inputs, output, states=states: states.append(output.abs()))
    found = Outliers()(model, text)
    largest = [torch.cat(states).amax().item() for states in by_block]
    medians = [sum(state.median().item() for state in states) / 2 for states in by_block]
    ratios = [most / median for most, median in zip(largest, medians, strict=True)]
    assert found.curves["activation_max_by_block"].values == pytest.approx(largest)
    assert found.curves["activation_ratio_by_block"].values == pytest.approx(ratios)
    assert found.scalars["activation_ratio"] == pytest.approx(max(ratios))
    for factor, massive in ((0.99, 1), (1.01, 0)):
        near = Outliers(ratio=factor * max(ratios))(model, text).curves["massive_dimensions_by_block"].values
        assert near[ratios.index(max(ratios))] == massive
    features = [int(torch.cat(states).flatten(0, 1).amax(0).argmax()) for states in by_block]
    assert found.curves["activation_dimension_by_block"].values == features


def test_an_ordinary_model_has_none() -> None:
    found = Outliers()(trained_like(placement="prenorm"), make_text())
    assert found.scalars["persistent_dimensions"] == 0
    assert found.scalars["activation_ratio"] < 100
    assert not found.notes


def test_the_dimension_of_a_second_stream_is_named_by_both() -> None:
    model = trained_like(placement="siamesenorm", num_layers=2)
    with torch.no_grad():
        model.embedding.weight[:, 3] = 1e5
    notes = Outliers()(model, make_text()).notes
    assert any(note.startswith("Dimension 3 of stream 2 is massive after blocks") for note in notes), notes


def inputs_of_attention(model: Transformer, batch: Batch) -> list[Tensor]:
    seen: list[Tensor] = []
    handles = [block.attn.register_forward_hook(lambda m, i, o: seen.append(i[0])) for block in model.blocks]
    with torch.no_grad():
        model(inputs_of(batch), batch.rows.get("positions"))
    for handle in handles:
        handle.remove()
    return seen


def weights_on(first: int, x: Tensor, attn: Any, head: int, theta: float) -> Tensor:
    """Of the last query of x [seq, dim], in a loop of its own: one document, which begins at the place `first`."""
    width = attn.head_dim
    q, k = (x @ layer.weight.T for layer in (attn.q_proj, attn.k_proj))
    q, k = (turn(part[:, head * width : (head + 1) * width], theta) for part in (q, k))
    return (k[first:] @ q[-1] / math.sqrt(width)).softmax(0)[0]


@pytest.mark.parametrize("masked", [False, True])
def test_sinks_and_kurtosis_against_a_loop(masked: bool) -> None:
    model, text = trained_like(placement="prenorm", num_layers=2), make_text(batches=2, sequences=2, seq=6)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]) if masked else None
    if positions is not None:
        batches = (text_batch(batch.rows["tokens"], batch.documents, positions) for batch in text.batches)
        text = replace(text, batches=tuple(batches))
    found = Outliers()(model, text)
    expected = torch.zeros(2, 4)
    for batch in text.batches:
        for block, inputs in enumerate(inputs_of_attention(model, batch)):
            for row in range(2):
                for query in range(6):
                    first = 3 if masked and row == 0 and query >= 3 else 0
                    # Rotary positions say distances alone, so that those of the sequence serve for the document.
                    for head in range(4 if query > first else 0):
                        attn = model.blocks[block].attn
                        x = inputs[row, : query + 1]
                        expected[block, head] += weights_on(first, x, attn, head, model.config.rope_theta).item()
    expected /= text.num_targets
    torch.testing.assert_close(torch.tensor(found.matrices["sink_by_head"]), expected, atol=1e-5, rtol=0)
    assert found.curves["sink_by_block"].values == pytest.approx(expected.mean(1).tolist(), abs=1e-5)
    assert found.scalars["sink_heads"] == (expected > 0.3).float().mean()
    assert found.scalars["sink"] == pytest.approx(found.by_document["sink"].sum() / text.num_targets)
    uniform = [1 / (n + 1) for n in ((1, 2, 1, 2, 1, 2, 3, 4, 5) if masked else (1, 2, 3, 4, 5) * 2)]
    assert found.scalars["sink_uniform"] == pytest.approx(sum(uniform) / 12)


def test_the_kurtosis_of_one_feature_is_the_width() -> None:
    model = trained_like(placement="prenorm", num_layers=1)
    with torch.no_grad():
        model.embedding.weight.zero_()
        model.embedding.weight[:, 2] = 1.0
        model.blocks[0].attn.o_proj.weight.zero_()
        model.blocks[0].ffn.down_proj.weight.zero_()
    found = Outliers()(model, make_text())
    assert found.curves["kurtosis_by_block"].values == pytest.approx([32.0])
    assert found.scalars["kurtosis"] == pytest.approx(32.0)


@pytest.mark.parametrize("placement", sorted(PLACEMENTS))
def test_every_placement_can_be_looked_at(placement: str) -> None:
    found = Outliers()(trained_like(placement=placement, num_layers=2), make_text(1))
    for curve in found.curves.values():
        assert len(curve.values) == 2
        assert all(map(math.isfinite, curve.values))


def test_a_ratio_that_says_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ratio=1 is not valid: expected a number > 1"):
        Outliers(ratio=1)
