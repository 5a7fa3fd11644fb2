"""The figures of an imported Llama, through our code and by hooks on transformers' own model."""

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from analysis.anatomy.contribution import Contribution
from analysis.anatomy.layer_drop import LayerDrop
from analysis.anatomy.lens import LogitLens
from analysis.anatomy.outliers import Outliers
from analysis.anatomy.pruning import Pruning
from analysis.anatomy.similarity import Similarity
from core.open_run import open_run
from tests.support.anatomy import inputs_of, make_text
from tests.support.pretrained import saved
from tools.importing import make_run

TEXT = make_text(batches=2, sequences=3, seq=11, vocab_size=53)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """transformers' model, and ours that was imported from its folder."""
    folder: Path = tmp_path_factory.mktemp("llama")
    theirs = saved(folder / "theirs", "Llama", num_hidden_layers=5)
    make_run(folder / "theirs", folder / "run")
    return theirs, open_run(folder / "run").module.model


@torch.no_grad()
def loss_of(model: Any, order: list[int]) -> float:
    """Of transformers' model with these of its layers, in this order."""
    changed = copy.deepcopy(model)
    changed.model.layers = torch.nn.ModuleList(changed.model.layers[number] for number in order)
    logits = torch.cat([changed(inputs_of(batch), use_cache=False).logits for batch in TEXT]).flatten(0, 1)
    return float(F.cross_entropy(logits, torch.cat([batch.targets for batch in TEXT]).flatten()))


@torch.no_grad()
def states_of(model: Any) -> list[torch.Tensor]:
    """Before the first layer and after each, [tokens, dim], by hooks on its layers."""
    found: list[list[torch.Tensor]] = [[] for _ in range(6)]
    hooks = [model.model.layers[0].register_forward_pre_hook(lambda module, inputs: found[0].append(inputs[0]))]
    for number, layer in enumerate(model.model.layers, start=1):

        def keep(module: Any, inputs: Any, output: Any, number: int = number) -> None:
            found[number].append(output[0] if isinstance(output, tuple) else output)

        hooks.append(layer.register_forward_hook(keep))
    for batch in TEXT:
        model(inputs_of(batch), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(states).flatten(0, 1) for states in found]


def test_the_loss_without_layers_is_theirs(both: tuple[Any, Any]) -> None:
    theirs, ours = both
    found = LayerDrop()(ours, TEXT)
    whole = loss_of(theirs, [0, 1, 2, 3, 4])
    assert found.scalars["loss"] == pytest.approx(whole, abs=1e-5)
    orders = [[n for n in range(5) if n != left_out] for left_out in range(5)]
    expected = [loss_of(theirs, order) - whole for order in orders]
    assert found.curves["drop_by_block"].values == pytest.approx(expected, abs=1e-5)
    orders = [[1, 0, 2, 3, 4], [0, 2, 1, 3, 4], [0, 1, 3, 2, 4], [0, 1, 2, 4, 3]]
    expected = [loss_of(theirs, order) - whole for order in orders]
    assert found.curves["swap_by_block"].values == pytest.approx(expected, abs=1e-5)
    expected = [loss_of(theirs, list(range(5 - count))) - whole for count in range(1, 6)]
    assert found.curves["cut_by_count"].values == pytest.approx(expected, abs=1e-5)


def test_the_pruned_layers_and_their_loss_are_theirs(both: tuple[Any, Any]) -> None:
    theirs, ours = both
    states, whole = states_of(theirs), loss_of(theirs, [0, 1, 2, 3, 4])
    found = Pruning()(ours, TEXT)
    for count in range(1, 6):
        cosines = [F.cosine_similarity(states[n], states[n + count], dim=-1) for n in range(6 - count)]
        start = int(np.argmin([float(cosine.double().clamp(-1, 1).arccos().mean()) for cosine in cosines]))
        assert found.curves["pruned_from"].values[count - 1] == start + 1
        left = [n for n in range(5) if not start <= n < start + count]
        assert found.curves["pruning_by_count"].values[count - 1] == pytest.approx(
            loss_of(theirs, left) - whole, abs=1e-5
        )


def test_states_and_what_is_added_are_theirs(both: tuple[Any, Any]) -> None:
    theirs, ours = both
    states = states_of(theirs)
    similar, added = Similarity()(ours, TEXT), Contribution()(ours, TEXT)
    centered = [(x - x.mean(0)).double() for x in states]
    for i, x in enumerate(centered):
        for j, y in enumerate(centered):
            cka = (y.mT @ x).norm() ** 2 / ((x.mT @ x).norm() * (y.mT @ y).norm())
            assert similar.matrices["cka"][i][j] == pytest.approx(float(cka), abs=1e-5)
    for number, (before, after) in enumerate(itertools.pairwise(states)):
        change = after - before
        ratio, cosine = change.norm(dim=-1) / before.norm(dim=-1), F.cosine_similarity(change, before, dim=-1)
        influence = 1 - F.cosine_similarity(before, after, dim=-1)
        for found, name, expected in (
            (added, "contribution_by_block", ratio),
            (added, "direction_by_block", cosine),
            (similar, "block_influence_by_block", influence),
        ):
            assert found.curves[name].values[number] == pytest.approx(float(expected.mean()), abs=1e-5)

    ratios = added.curves["contribution_by_block"].values
    late = (ratios[3] + ratios[4]) / (ratios[0] + ratios[1])
    assert added.scalars["late_contribution"] == pytest.approx(late), "of five the middle one is in no half"
    last = states[-1].double().unflatten(0, (-1, 11))
    shares = [torch.linalg.svdvals(x) / torch.linalg.svdvals(x).sum() for x in last]
    ranks = [float((-share * share.log()).sum().exp()) for share in shares]
    assert similar.scalars["effective_rank"] == pytest.approx(np.mean(ranks), rel=1e-4)
    units = F.normalize(last, dim=-1)
    pairs = (units @ units.mT).masked_select(~torch.eye(11, dtype=torch.bool))
    assert similar.scalars["token_similarity"] == pytest.approx(float(pairs.mean()), abs=1e-5)


def test_outliers_and_sinks_are_theirs(both: tuple[Any, Any]) -> None:
    theirs, ours = both
    found = Outliers()(ours, TEXT)
    states = states_of(theirs)[1:]
    assert found.curves["activation_max_by_block"].values == pytest.approx([float(x.abs().max()) for x in states])
    tails = [float((x**4).mean(-1).div((x**2).mean(-1) ** 2).mean()) for x in states]
    assert found.curves["kurtosis_by_block"].values == pytest.approx(tails, rel=1e-4)
    eager = copy.deepcopy(theirs)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = [eager(inputs_of(batch), output_attentions=True, use_cache=False).attentions for batch in TEXT]
    for block in range(5):
        on_first = torch.cat([of_batch[block][..., 0] for of_batch in weights])  # [sequences, heads, queries]
        on_first[..., 0] = 0
        assert found.matrices["sink_by_head"][block] == pytest.approx(on_first.mean((0, 2)).tolist(), abs=1e-5)


def test_every_depth_is_read_as_theirs(both: tuple[Any, Any]) -> None:
    theirs, ours = both
    with torch.no_grad():
        seen = [theirs.lm_head(theirs.model.norm(x)).log_softmax(-1) for x in states_of(theirs)]
    found = LogitLens()(ours, TEXT)
    expected = [float((seen[-1].exp() * (seen[-1] - x)).sum(-1).mean()) for x in seen]
    assert found.curves["lens_divergence_by_depth"].values == pytest.approx(expected, abs=1e-5)
    targets = torch.cat([batch.targets for batch in TEXT]).flatten()
    expected = [float(F.nll_loss(x, targets)) for x in seen]
    assert found.curves["lens_loss_by_depth"].values == pytest.approx(expected, abs=1e-5)
