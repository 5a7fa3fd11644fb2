"""Similarity of depths, against the formulas written out in numpy."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from analysis.anatomy.expert_similarity import weight_cosines
from analysis.anatomy.similarity import CrossSimilarity, Similarity, angular_distances, cosines, linear_cka
from analysis.states import watching
from tests.support.anatomy import inputs_of, make_text, trained_like


def states_of(model: Any, text: Any) -> list[np.ndarray[Any, Any]]:
    """[tokens, features] at every depth, as hooks see them in the model's own forward pass."""
    found: list[list[torch.Tensor]] = [[] for _ in range(len(model.blocks) + 1)]
    for batch in text:
        views: list[Any] = []
        with torch.no_grad(), watching(model, views.append):
            model(inputs_of(batch))
        for part, state in zip(found, [views[0].before, *(view.after for view in views)], strict=True):
            part.append(state.flatten(0, 1))
    return [torch.cat(part).double().numpy() for part in found]


def cka_of_features(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float:
    """Of the features' covariances, where the code takes the tokens' inner products."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float(np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


@pytest.mark.parametrize("placement", ["prenorm", "spannorm", "residual", "mhc", "attnres"])
def test_every_pair_of_depths_is_compared_as_the_papers_have_it(placement: str) -> None:
    model, text = trained_like(placement=placement), make_text()
    found = Similarity()(model, text)
    states = states_of(model, text)
    for i, j in itertools.product(range(5), repeat=2):
        assert found.matrices["cka"][i][j] == pytest.approx(cka_of_features(states[i], states[j]), abs=1e-5)
        norms = np.linalg.norm(states[i], axis=1) * np.linalg.norm(states[j], axis=1)
        cosine = (states[i] * states[j]).sum(1) / norms
        assert found.matrices["cosine"][i][j] == pytest.approx(cosine.mean(), abs=1e-5)
        angle = np.arccos(cosine.clip(-1, 1)).mean() / np.pi
        assert found.matrices["angular_distance"][i][j] == pytest.approx(angle, abs=1e-6)
        if j == i + 1:
            assert found.curves["block_influence_by_block"].values[i] == pytest.approx(1 - cosine.mean(), abs=1e-5)
    pairs = [cka_of_features(states[i], states[j]) for i, j in ((2, 3), (2, 4), (3, 4))]
    assert found.scalars["late_similarity"] == pytest.approx(np.mean(pairs), abs=1e-5)


def test_rank_and_likeness_of_tokens_are_means_over_sequences() -> None:
    model, text = trained_like(), make_text(batches=2, sequences=3, seq=12)
    found = Similarity()(model, text)
    by_sequence = states_of(model, text)[-1].reshape(6, 12, -1)
    shares = [np.linalg.svd(x)[1] / np.linalg.svd(x)[1].sum() for x in by_sequence]
    assert found.scalars["effective_rank"] == pytest.approx(np.mean([np.exp(-(s * np.log(s)).sum()) for s in shares]))
    units = by_sequence / np.linalg.norm(by_sequence, axis=-1, keepdims=True)
    grams = units @ units.transpose(0, 2, 1)
    assert found.scalars["token_similarity"] == pytest.approx((grams.sum((1, 2)) - 12).mean() / (12 * 11), abs=1e-5)


def test_cka_does_not_see_rotation_and_size_but_sees_another_representation() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 6, generator=generator), torch.randn(200, 9, generator=generator)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    assert float(linear_cka([x], [3 * x @ rotation + 1])) == pytest.approx(1, abs=1e-5)
    assert float(linear_cka([x], [y])) < 0.2


def test_autocast_does_not_round_what_is_measured() -> None:
    """Deep states turn by little: in bfloat16 two that are 1e-3 apart are the same. The formulas are numpy's."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, 40, 32, generator=generator)
    states = [first, first + 1e-3 * torch.randn(2, 40, 32, generator=generator), first.flip(0)]
    flat = [state.flatten(0, 1) for state in states]
    mixture = trained_like(ffn="moe").blocks[0].ffn
    measures = (
        lambda: cosines(states),
        lambda: angular_distances(states),
        lambda: linear_cka(flat, flat),
        lambda: weight_cosines(mixture),
    )
    for measure in measures:
        plain = measure()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(measure(), plain)
    x, y = (state.double().numpy() for state in flat[:2])
    cosine = (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
    np.testing.assert_allclose(1 - cosines(states)[0, 1].numpy(), 1 - cosine, atol=1e-14)
    np.testing.assert_allclose(angular_distances(states)[0, 1].numpy(), np.arccos(cosine) / np.pi, rtol=1e-6)
    np.testing.assert_allclose(1 - linear_cka(flat, flat)[0, 1].numpy(), 1 - cka_of_features(x, y), atol=1e-13)


def test_some_of_the_tokens_are_taken_over_the_whole_text() -> None:
    model, text = trained_like(), make_text(batches=3)  # 108 tokens
    states = states_of(model, text)
    found = Similarity(positions=36)(model, text)
    assert found.matrices["cka"][0][4] == pytest.approx(cka_of_features(states[0][::3], states[4][::3]), abs=1e-5)


def test_two_models_are_compared_depth_by_depth() -> None:
    first, second, text = trained_like(0, num_layers=2), trained_like(1, num_layers=3, dim=48), make_text()
    found = CrossSimilarity()(first, second, text).matrices["cross_cka"]
    expected = [[cka_of_features(x, y) for y in states_of(second, text)] for x in states_of(first, text)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
