"""The loss without blocks, against models in which these blocks are not there."""

import numpy as np
import pytest

from analysis.anatomy.layer_drop import LayerDrop
from tests.support.anatomy import KINDS, MODELS, data_of, in_order, loss_of, of_kind, without


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("placement", "ffn"), MODELS)
def test_a_block_left_out_is_one_whose_sublayers_put_out_zeros(placement: str, ffn: str, kind: str) -> None:
    model, text = of_kind(kind, placement=placement, ffn=ffn, num_layers=3), data_of(kind)
    found = LayerDrop()(model, text)
    loss = loss_of(model, text)
    assert found.scalars["loss"] == pytest.approx(loss, abs=1e-5)
    expected = [loss_of(without(model, number), text) - loss for number in range(3)]
    assert found.curves["drop_by_block"].values == pytest.approx(expected, abs=1e-4)
    assert found.scalars["layer_drop"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert found.scalars["late_drop"] == pytest.approx(np.mean(expected[1:]), abs=1e-4)
    cut = [loss_of(without(model, *range(3 - k, 3)), text) - loss for k in (1, 2, 3)]
    assert found.curves["cut_by_count"].values == pytest.approx(cut, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", ["spannorm", "postnorm", "prenorm"])
def test_a_block_passed_over_or_swapped_is_one_that_stands_elsewhere(placement: str, kind: str) -> None:
    """Of four, whose last one stays: it may have a norm before the head."""
    model, text = of_kind(kind, placement=placement), data_of(kind)
    found = LayerDrop(skip="identity")(model, text)
    loss = loss_of(model, text)
    expected = [loss_of(in_order(model, *order), text) - loss for order in ((1, 2, 3), (0, 2, 3), (0, 1, 3))]
    assert found.curves["drop_by_block"].values[:3] == pytest.approx(expected, abs=1e-4)
    expected = [loss_of(in_order(model, *order), text) - loss for order in ((1, 0, 2, 3), (0, 2, 1, 3))]
    assert found.curves["swap_by_block"].values[:2] == pytest.approx(expected, abs=1e-4)
    assert min(map(abs, expected)) > 1e-3
