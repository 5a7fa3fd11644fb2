"""The lenses, against the head written out, and a fitted one against what it has to find."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from analysis.anatomy import lens
from analysis.anatomy.lens import LogitLens, TunedLens, effective_depth
from analysis.states import watching
from core.errors import ConfigError
from tests.support.anatomy import inputs_of, make_text, trained_like


def logits_by_depth(model: Any, batch: Any) -> list[torch.Tensor]:
    """By hooks: the final norm and the head on every state of a PreNorm model."""
    views: list[Any] = []
    with torch.no_grad(), watching(model, views.append):
        model(inputs_of(batch))
        norm = model.blocks[-1].placement.final_norm
        return [F.linear(norm(x), model.head.weight) for x in (views[0].before, *(view.after for view in views))]


def test_a_depth_is_read_by_the_final_norm_and_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = trained_like(placement="prenorm"), make_text()
    found = LogitLens()(model, text)
    monkeypatch.setattr(lens, "MAX_LOGITS", 50 * 7)  # seven tokens at a time
    in_parts = LogitLens()(model, text)
    by_batch = [(logits_by_depth(model, batch), batch) for batch in text]
    for depth in range(5):
        divergences, overlaps, losses = [], [], []
        for logits, batch in by_batch:
            p, q = logits[-1].softmax(-1).double().numpy(), logits[depth].softmax(-1).double().numpy()
            divergences += (p * np.log(p / q)).sum(-1).ravel().tolist()
            losses += (-np.log(np.take_along_axis(q, batch.targets.numpy()[..., None], -1))).ravel().tolist()
            tops = np.argsort(p, -1)[..., -5:].reshape(-1, 5), np.argsort(q, -1)[..., -5:].reshape(-1, 5)
            overlaps += [len(set(a) & set(b)) / 5 for a, b in zip(*tops, strict=True)]
        for findings in (found, in_parts):
            for name, values in (("divergence", divergences), ("overlap", overlaps), ("loss", losses)):
                curve = findings.curves[f"lens_{name}_by_depth"]
                assert curve.values[depth] == pytest.approx(np.mean(values), abs=1e-4)
    assert found.curves["lens_loss_by_depth"].first == 0
    assert found.curves["lens_divergence_by_depth"].values[-1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("divergence", "depth"), [([5, 3, 0.6, 0.4, 0], 3), ([1, 10, 2, 0.9, 0], 3), ([5, 5, 5, 5, 0], 4), ([0, 0], 0)]
)
def test_effective_depth_is_where_the_divergence_is_below_a_tenth_of_the_largest(
    divergence: list[float], depth: int
) -> None:
    assert effective_depth(divergence) == depth


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_depths_are_read_off_the_curves(seed: int) -> None:
    found = LogitLens()(trained_like(seed, placement="prenorm", num_layers=6), make_text())
    overlap = found.curves["lens_overlap_by_depth"].values
    divergence = found.curves["lens_divergence_by_depth"].values
    assert found.scalars["lens_overlap_depth"] == min(depth for depth in range(7) if overlap[depth] > 0.2)
    assert found.scalars["lens_effective_depth"] == effective_depth(divergence)
    assert found.scalars["lens_effective_share"] == pytest.approx(effective_depth(divergence) / 6)
    assert found.scalars["lens_overlap_depth"] > 0


def test_a_tuned_lens_finds_an_affine_map() -> None:
    """A model whose blocks do nothing but the last, which adds a constant: b finds it at every depth before."""
    model = trained_like(placement="postnorm", norm="none", dim=16, num_heads=2, num_layers=2)
    with torch.no_grad():
        for block in model.blocks:
            for parameter in (*block.attn.parameters(), *block.ffn.parameters()):
                parameter.zero_()
    shift = torch.randn(16, generator=torch.Generator().manual_seed(0))
    model.blocks[1].ffn.register_forward_hook(lambda module, inputs, output: (output[0] + shift, output[1]))
    text = make_text()
    text = dataclasses.replace(text, fitting=text.batches)
    tuned = TunedLens(steps=300, lr=0.03)
    plain = LogitLens()(model, text).curves["lens_divergence_by_depth"].values
    found = tuned(model, text).curves["tuned_divergence_by_depth"].values
    assert plain[0] == pytest.approx(plain[1], rel=1e-5)
    assert plain[1] > 0.1
    assert max(found) < 0.02 * plain[1]


def test_the_lens_starts_as_the_logit_lens_and_only_improves_what_it_is_fitted_on() -> None:
    model, text = trained_like(), make_text(batches=3)
    text = dataclasses.replace(text, fitting=text.batches)
    plain = LogitLens()(model, text).curves["lens_divergence_by_depth"].values
    barely = TunedLens(steps=1, lr=1e-9)(model, text).curves["tuned_divergence_by_depth"].values
    assert barely == pytest.approx(plain, abs=1e-4)
    fitted = TunedLens(steps=150, lr=1e-2)(model, text)
    values = fitted.curves["tuned_divergence_by_depth"].values
    assert all(after < 0.8 * before for after, before in zip(values[:-1], plain[:-1], strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def fitted_by_hand(model: Any, text: Any, depth: int, tuned: TunedLens) -> list[torch.Tensor]:
    """A and b of one depth: one batch a step, of it every n-th token, from another one on in each turn through all."""
    matrix, offset = torch.zeros(32, 32, requires_grad=True), torch.zeros(32, requires_grad=True)
    optimizer = torch.optim.Adam([matrix, offset])
    for step in range(tuned.steps):
        turn, number = divmod(step, len(text.fitting))
        views: list[Any] = []
        with torch.no_grad(), watching(model, views.append):
            model(inputs_of(text.fitting[number]))
        norm = model.blocks[-1].placement.final_norm
        x, last = (norm(state.detach()).flatten(0, 1) for state in (views[depth].before, views[-1].after))
        every = math.ceil(len(x) / tuned.targets)
        taken = [n for n in range(len(x)) if n % every == turn % every]
        x, final = x[taken], F.linear(last[taken], model.head.weight).softmax(-1).detach()
        seen = F.linear(x + x @ matrix.T + offset, model.head.weight).log_softmax(-1)
        optimizer.zero_grad()
        ((final * (final.log() - seen)).sum() / len(x)).backward()
        optimizer.param_groups[0]["lr"] = tuned.lr * (1 - step / tuned.steps)
        optimizer.step()
    return [matrix.detach(), offset.detach()]


def test_a_tuned_lens_is_fitted_by_adam_on_the_divergence() -> None:
    model, text = trained_like(placement="prenorm", num_layers=2), make_text()
    text = dataclasses.replace(text, fitting=text.batches)
    tuned = TunedLens(steps=7, lr=1e-2, targets=10)
    for depth, found in enumerate(tuned.fit(model, text)):
        torch.testing.assert_close(list(found), fitted_by_hand(model, text, depth, tuned), rtol=1e-3, atol=1e-4)


def test_a_tuned_lens_never_sees_what_it_is_measured_on() -> None:
    model, here, there = trained_like(num_layers=2), make_text(), make_text(batches=4)
    tuned = TunedLens(steps=3, lr=1e-2)
    text = dataclasses.replace(here, fitting=here.batches[:1])
    ((matrix, _), *_), ((of_another, _), *_) = (
        tuned.fit(model, dataclasses.replace(text, batches=batches)) for batches in (here.batches, there.batches[2:])
    )
    assert torch.equal(matrix, of_another)
    ((fitted_elsewhere, _), *_) = tuned.fit(model, dataclasses.replace(text, fitting=there.batches[2:]))
    assert not torch.allclose(matrix, fitted_elsewhere)


def test_a_text_without_a_training_part_is_refused() -> None:
    with pytest.raises(ConfigError, match="one to fit the lens on"):
        TunedLens()(trained_like(), make_text())
