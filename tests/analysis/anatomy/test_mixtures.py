"""What is said of mixtures, against mixtures whose experts are taken out, doubled, or told which token to take."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.anatomy.expert_drop import ExpertDrop
from analysis.anatomy.expert_share import ExpertShare, mutual_information
from analysis.anatomy.expert_similarity import ExpertSimilarity
from analysis.anatomy.held_out import HeldOut
from analysis.anatomy.routing import chosen_experts, without_expert
from analysis.anatomy.routing_agreement import RoutingAgreement
from core.errors import ConfigError
from datamodules.tokenizers import ByteTokenizer
from lightning_modules.layers.moe import MoE
from lightning_modules.transformer import Transformer
from tests.support import reference
from tests.support.anatomy import inputs_of, make_text, text_batch, trained_like
from tests.support.moe import inputs, make_moe


def mixture_of(model: Transformer, number: int) -> MoE:
    ffn = model.blocks[number - 1].ffn
    assert isinstance(ffn, MoE)
    return ffn


def mean_loss(model: Transformer, text: HeldOut) -> float:
    with torch.no_grad():
        logits = torch.cat([model(inputs_of(batch))[0] for batch in text])
    return F.cross_entropy(logits.flatten(0, 1), torch.cat([batch.targets for batch in text]).flatten()).item()


# Shares.


def spelled(*texts: bytes) -> HeldOut:
    """One sequence a text, of bytes."""
    batches = []
    for number, each in enumerate(texts):
        tokens = torch.tensor([list(each)])
        documents = torch.full((1, len(each) - 1), number)
        batches.append(text_batch(tokens, documents))
    return HeldOut(tuple(batches), ByteTokenizer())


def told(kinds: dict[str, int]) -> Transformer:
    """A model whose routers send letters, digits and all else to the experts that are named; of bytes."""
    torch.manual_seed(0)
    model = trained_like(placement="prenorm", num_layers=2, ffn="moe", vocab_size=257, moe={"top_k": 1})
    with torch.no_grad():
        model.embedding.weight[:, :3] = 0.0
        for token in range(257):
            kind = "letters" if chr(token).isalpha() else "digits" if chr(token).isdigit() else "else"
            model.embedding.weight[token, list(kinds).index(kind)] = 100.0
        for block in model.blocks:
            for weight in (block.attn.o_proj.weight, block.ffn.experts.mlp.w2.T):
                weight[:3] = 0.0
            block.ffn.router.layer.weight.zero_()
            for place, expert in enumerate(kinds.values()):
                block.ffn.router.layer.weight[expert, place] = 1.0
    return model


def test_who_takes_what() -> None:
    """Five letters, three digits and four spaces are read; the last character of a text is not."""
    found = ExpertShare()(told({"letters": 2, "digits": 0, "else": 3}), spelled(b"ab 12 c", b"def 3 x"))
    assert found.matrices["expert_share_letters"] == [[0, 0, 1, 0]] * 2
    assert found.matrices["expert_share_digits"] == [[1, 0, 0, 0]] * 2
    assert found.matrices["expert_share_whitespace"] == [[0, 0, 0, 1]] * 2
    assert "expert_share_punctuation" not in found.matrices
    letters, digits, spaces = 5, 3, 4
    shares = [part / 12 for part in (digits, 0, letters, spaces)]
    assert found.matrices["expert_share"] == [pytest.approx(shares)] * 2
    assert found.scalars["busiest_expert"] == pytest.approx(4 * letters / 12)
    entropy = -sum(share * math.log(share) for share in shares if share)
    assert found.scalars["kind_information"] == pytest.approx(entropy)


def test_experts_that_do_not_look_at_kinds_know_nothing_of_them() -> None:
    found = ExpertShare()(told({"letters": 1, "digits": 1, "else": 1}), spelled(b"ab 12 c"))
    assert found.scalars["kind_information"] == pytest.approx(0, abs=1e-12)
    assert found.scalars["busiest_expert"] == 4
    counts = torch.tensor([[[3.0, 1.0], [1.0, 3.0]]])
    assert mutual_information(counts).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_a_token_counts_for_each_of_its_experts() -> None:
    model, text = trained_like(ffn="moe", num_layers=3, moe={"first_dense_layers": 1}), make_text()
    found = ExpertShare()(model, text)
    stats: list[Tensor] = []
    with torch.no_grad():
        for batch in text:
            stats.append(torch.stack([layer.tokens_per_expert for layer in model(inputs_of(batch))[1]]))
    counts = torch.stack(stats).sum(0)
    expected = (counts / (2 * text.num_targets)).tolist()
    assert found.matrices["expert_share"] == [pytest.approx(row) for row in expected]
    assert found.notes == ("Mixtures are counted from 1; they are blocks 2, 3.",)


# An expert left out.


@pytest.mark.parametrize("moe", [{}, {"score": "sigmoid"}, {"top_k": 1}, {"normalize_weights": False}])
def test_without_an_expert_a_mixture_is_one_that_never_had_it(moe: dict[str, Any]) -> None:
    """Its weights, and its row of the router, are cut out of the reference."""
    layer, x = make_moe(**moe), inputs(30).detach()
    smaller = make_moe(**{**moe, "num_experts": 3})
    rest = torch.tensor([0, 2, 3])
    with torch.no_grad():
        smaller.router.layer.weight.copy_(layer.router.layer.weight[rest])
        for name in ("w1", "v1", "w2"):
            stacked = getattr(layer.experts.mlp, name).unflatten(0, (4, -1))
            getattr(smaller.experts.mlp, name).copy_(stacked[rest].flatten(0, 1))
        expected, _ = smaller(x)
        with without_expert(layer, 1):
            out, stats = layer(x)
        torch.testing.assert_close(out, expected)
        assert stats.tokens_per_expert[1] == 0
        before, _ = layer(x)
        assert not torch.allclose(before, expected)
        if not moe:
            weights = {name: value.detach() for name, value in smaller.named_parameters()}
            torch.testing.assert_close(out, reference.moe(x, weights, 3, 2), rtol=1e-4, atol=1e-5)


def test_a_bias_does_not_bring_it_back() -> None:
    """Selection is by scores and bias: a score of 0 with a large bias would be chosen."""
    layer, x = make_moe(balancing="bias", score="sigmoid"), inputs(30).detach()
    assert layer.router.expert_bias is not None
    layer.router.expert_bias.copy_(torch.tensor([0.5, 9.0, -0.5, 0.25]))
    with torch.no_grad():
        assert layer(x)[1].tokens_per_expert[1] == 30
        with without_expert(layer, 1):
            assert layer(x)[1].tokens_per_expert[1] == 0
        assert layer(x)[1].tokens_per_expert[1] == 30
    assert layer.router.expert_bias.tolist() == [0.5, 9.0, -0.5, 0.25]


@pytest.mark.parametrize("placement", ["spannorm", "prenorm", "siamesenorm", "attnres"])
def test_the_loss_without_each_expert(placement: str) -> None:
    """Against a router whose logit of that expert is masked by hand."""
    model = trained_like(placement=placement, ffn="moe", num_layers=3, moe={"layer_interval": 2, "num_experts": 3})
    text = make_text()
    found = ExpertDrop()(model, text)
    loss, expected = mean_loss(model, text), torch.zeros(1, 3)
    for expert in range(3):
        changed = copy.deepcopy(model)
        router = mixture_of(changed, 2).router.layer
        router.register_forward_hook(
            lambda module, inputs, logits, expert=expert: torch.where(torch.arange(3) == expert, -1e9, logits)
        )
        expected[0, expert] = mean_loss(changed, text) - loss
    assert found.matrices["expert_drop_by_expert"] == [pytest.approx(expected[0].tolist(), abs=1e-4)]
    assert found.scalars["expert_drop"] == pytest.approx(expected.mean().item(), abs=1e-4)
    assert found.curves["expert_drop_most_by_mixture"].values == pytest.approx([expected.max().item()], abs=1e-4)
    assert found.by_document["expert_drop"].sum() / text.num_targets == pytest.approx(found.scalars["expert_drop"])
    assert found.notes == ("Mixtures are counted from 1; they are blocks 2.",)
    assert expected.abs().max() > 1e-3


# Similarity.


def test_experts_that_are_the_same_are_found() -> None:
    """Expert 2 is a copy of expert 0; expert 3 is one too, with its hidden features in another order."""
    model, text = trained_like(ffn="moe", num_layers=1), make_text()
    mlp = mixture_of(model, 1).experts.mlp
    with torch.no_grad():
        order = torch.randperm(mlp.hidden_dim)
        for weight in (mlp.w1, mlp.v1, mlp.w2):
            experts = weight.unflatten(0, (4, -1))
            experts[2] = experts[0]
            experts[3] = experts[0][order]
    found = ExpertSimilarity()(model, text)
    cosine, cka = (torch.tensor(found.matrices[f"{name}_1"]) for name in ("expert_cosine", "expert_cka"))
    assert cosine[0, 2].item() == pytest.approx(1, abs=1e-5)
    assert cosine[[0, 1], [3, 0]].abs().max() < 0.2
    assert cka[[0, 0], [2, 3]].tolist() == pytest.approx([1, 1], abs=1e-5)
    assert cka[0, 1] < 0.9


def test_similarity_against_plain_formulas() -> None:
    model, text = trained_like(ffn="moe", num_layers=2, placement="prenorm"), make_text(batches=1)
    seen: list[Tensor] = []
    handle = model.blocks[1].ffn.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    found = ExpertSimilarity(positions=36)(model, text)
    handle.remove()
    x, mlp = seen[0].flatten(0, 1), mixture_of(model, 2).experts.mlp
    w1, v1, w2 = (weight.detach().chunk(4) for weight in (mlp.w1, mlp.v1, mlp.w2))
    outputs = [(reference.silu(x @ w1[e].T) * (x @ v1[e].T)) @ w2[e] for e in range(4)]
    flat = [torch.cat([w1[e].flatten(), v1[e].flatten(), w2[e].flatten()]) for e in range(4)]
    for first in range(4):
        for second in range(4):
            a, b = (outputs[e] - outputs[e].mean(0) for e in (first, second))
            cka = (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
            assert found.matrices["expert_cka_2"][first][second] == pytest.approx(cka.item(), abs=1e-4)
            cosine = F.cosine_similarity(flat[first], flat[second], dim=0)
            assert found.matrices["expert_cosine_2"][first][second] == pytest.approx(cosine.item(), abs=1e-5)
    pairs = [(a, b) for a in range(4) for b in range(a)]
    mean = sum(found.matrices["expert_cka_2"][a][b] for a, b in pairs) / 6
    assert found.curves["expert_cka_by_mixture"].values[1] == pytest.approx(mean, abs=1e-5)
    assert set(found.scalars) == {"expert_cosine", "expert_cka"}


# Two checkpoints.


def test_a_model_agrees_with_itself() -> None:
    model, text = trained_like(ffn="moe"), make_text()
    found = RoutingAgreement()(model, copy.deepcopy(model), text)
    assert found.scalars["routing_agreement"] == 1
    assert 0.5 <= found.scalars["routing_chance"] < 1


def test_agreement_counted_token_by_token() -> None:
    first, second = (trained_like(seed, ffn="moe", num_layers=2) for seed in (0, 1))
    text = make_text()
    found = RoutingAgreement()(first, second, text)
    shared, sets = torch.zeros(2), [[[0] * 4 for _ in range(2)] for _ in range(2)]
    for batch in text:
        chosen = [[set_of.tolist() for set_of in chosen_experts(model, batch)] for model in (first, second)]
        for mixture in range(2):
            for ours, theirs in zip(chosen[0][mixture], chosen[1][mixture], strict=True):
                shared[mixture] += len(set(ours) & set(theirs)) / 2
                for model, own in enumerate((ours, theirs)):
                    for expert in own:
                        sets[model][mixture][expert] += 1
    expected = (shared / text.num_targets).tolist()
    assert found.curves["routing_agreement_by_mixture"].values == pytest.approx(expected)
    assert found.scalars["routing_agreement"] == pytest.approx(sum(expected) / 2)
    assert found.by_document["routing_agreement"].sum() / text.num_targets == pytest.approx(sum(expected) / 2)
    for mixture in range(2):
        pairs = zip(sets[0][mixture], sets[1][mixture], strict=True)
        chance = sum(a * b for a, b in pairs) / text.num_targets**2 / 2
        assert found.curves["routing_chance_by_mixture"].values[mixture] == pytest.approx(chance)


def test_where_there_are_no_numbers_nothing_agrees() -> None:
    model, text = trained_like(ffn="moe", num_layers=2), make_text()
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.blocks[1].attn.o_proj.weight[0, 0] = math.nan
    for pair in ((model, broken), (broken, model), (broken, broken)):
        first, second = RoutingAgreement()(*pair, text).curves["routing_agreement_by_mixture"].values
        assert first == 1
        assert math.isnan(second)


def test_the_chosen_experts_are_those_of_the_largest_logits() -> None:
    model, batch = trained_like(ffn="moe", num_layers=1), make_text(1).batches[0]
    seen: list[Tensor] = []
    handle = model.blocks[0].ffn.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        (chosen,) = chosen_experts(model, batch)
    handle.remove()
    logits = seen[0].flatten(0, 1) @ mixture_of(model, 1).router.layer.weight.detach().T
    expected = [set(row.argsort(descending=True)[:2].tolist()) for row in logits]
    assert [set(row) for row in chosen.tolist()] == expected


# What cannot be measured.


def test_models_without_mixtures_lack_them() -> None:
    dense, mixture = trained_like(num_layers=1), trained_like(ffn="moe", num_layers=1)
    for measure in (ExpertShare(), ExpertDrop(), ExpertSimilarity()):
        assert measure.lacks(dense) == "it has no mixture of experts"
        assert measure.lacks(mixture) is None
    assert RoutingAgreement().lacks(dense, mixture) == "it has no mixture of experts"
    assert RoutingAgreement().lacks(mixture, mixture) is None
    every = trained_like(ffn="moe", num_layers=1, moe={"top_k": 4})
    assert ExpertDrop().lacks(every) == "each token goes to all of model.moe.num_experts=4"
    one = trained_like(ffn="moe", num_layers=1, moe={"num_experts": 1, "top_k": 1})
    assert ExpertSimilarity().lacks(one) == "it has one expert, model.moe.num_experts=1"
    reason = RoutingAgreement().lacks(mixture, every)
    assert reason == "its experts a token are 4, those of the first are 2"
    deeper = trained_like(ffn="moe", num_layers=2)
    assert RoutingAgreement().lacks(mixture, deeper) == "its mixtures in blocks are [1, 2], those of the first are [1]"


def test_one_position_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"positions=1 is not valid: expected an integer >= 2"):
        ExpertSimilarity(positions=1)
