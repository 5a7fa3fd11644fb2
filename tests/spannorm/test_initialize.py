"""`initialize` draws the matrices of any model by roles: against the suite's own, and numbers worked out by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.initialization import initialize as initialize_ours
from lightning_modules.transformer import Transformer
from spannorm import EmbeddingScale, Init, InvalidArgument, Role, draw, initialize, plain_init, scale_init
from tests.support.models import VOCAB_SIZE, tiny_config

SUITE: dict[str, Role] = {
    "embedding.weight": "embedding",
    "head.weight": "head",
    "*.q_proj.weight": "query",
    "*.k_proj.weight": "key",
    "*.v_proj.weight": "value",
    "*.o_proj.weight": "attn_out",
    "*.gate_proj.weight": "ffn_up",
    "*.up_proj.weight": "ffn_up",
    "*.down_proj.weight": "ffn_down",
}


class Tiny(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(400, 100), nn.Linear(100, 400)
        self.experts = nn.Parameter(torch.zeros(3, 50, 100))
        if tied:
            self.head.weight = self.embed.weight


ROLES: dict[str, Role] = {"embed.weight": "embedding", "head.*": "head", "experts": "ffn_up"}


@pytest.mark.parametrize("truncation", [None, 2.0])
def test_the_suites_model_is_drawn_as_the_suite_draws_it(truncation: float | None) -> None:
    theirs, ours = (
        Transformer(tiny_config(placement="prenorm", init="scale_init", init_truncation=truncation), VOCAB_SIZE)
        for _ in range(2)
    )
    torch.manual_seed(3)
    initialize_ours(ours)
    torch.manual_seed(3)
    drawn = initialize(theirs, scale_init(2), SUITE, truncation)
    assert {name: matrix.role for name, matrix in drawn.items()} == {
        name: next(role for pattern, role in SUITE.items() if name.endswith(pattern.removeprefix("*")))
        for name, parameter in theirs.named_parameters()
        if parameter.dim() == 2
    }
    # The suite goes through its matrices in another order, so that the numbers differ and their sizes do not.
    for (name, mine), (_, reference) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        tolerance = 6 / (2 * mine.numel()) ** 0.5
        assert float(mine.detach().std()) == pytest.approx(float(reference.detach().std()), rel=tolerance), name


def test_every_matrix_has_the_standard_deviation_of_its_role_and_vectors_stay() -> None:
    model = Tiny()
    bias = model.head.bias.clone()
    initialize(model, scale_init(4), ROLES)
    assert float(model.embed.weight.detach().std()) == pytest.approx(1.0, rel=0.03)
    assert float(model.head.weight.detach().std()) == pytest.approx(0.1, rel=0.03)  # 1/sqrt(100)
    assert float(model.experts.detach().std()) == pytest.approx(0.1, rel=0.05)
    assert torch.equal(model.head.bias, bias)


@pytest.mark.parametrize(
    "roles", [{"embed.weight": "embedding"}, {"embed.weight": "embedding", "head.weight": "head"}, {"*.weight": "head"}]
)
def test_a_tied_matrix_is_bounded_by_its_use_as_a_head(roles: dict[str, Role]) -> None:
    model = Tiny(tied=True)
    drawn = initialize(model, scale_init(4), {**roles, "experts": "ffn_up"})
    assert drawn["embed.weight"][:1] + drawn["embed.weight"][2:4] == ("embedding", 100, 100)
    assert float(model.embed.weight.detach().std()) == pytest.approx(0.1, rel=0.03)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"embed.weight": "embedding", "experts": "ffn_up"}, "a role for every matrix: head.weight has none"),
        ({**ROLES, "haed.weight": "head"}, "roles='haed.weight' is not valid: expected the name of a parameter"),
        ({**ROLES, "experts": "expert"}, "roles='expert' is not valid: expected roles of embedding, head, "),
    ],
)
def test_roles_that_leave_a_matrix_out_or_name_none_are_refused(roles: Any, message: str) -> None:
    model = Tiny()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(InvalidArgument, match=message):
        initialize(model, plain_init(1), roles)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf"), None, "0.02"])
def test_an_init_that_is_no_standard_deviation_is_refused(std: Any) -> None:
    init: Init = lambda matrix: std  # noqa: E731
    with pytest.raises(InvalidArgument, match="a finite standard deviation > 0 for ffn_up"):
        initialize(Tiny(), init, ROLES)


@pytest.mark.parametrize("truncation", [0.0, -2.0, float("nan")])
def test_a_truncation_that_leaves_nothing_is_refused(truncation: float) -> None:
    with pytest.raises(InvalidArgument, match="truncation"):
        initialize(Tiny(), plain_init(1), ROLES, truncation)


def test_a_truncation_redraws_what_is_further_out() -> None:
    weight = torch.empty(100, 100)
    draw(weight, 0.5, truncation=2.0)
    assert weight.abs().max() <= 1.0
    assert float(weight.std()) == pytest.approx(0.5 * 0.8796, rel=0.05)  # of a normal cut at two standard deviations


def test_a_unit_scale_on_the_embedding_undoes_the_embeddings_size() -> None:
    model = Tiny()
    model.scale, model.fixed = EmbeddingScale(None), EmbeddingScale(3.0)
    initialize(model, plain_init(1, std=0.02), ROLES)
    assert model.scale.weight.tolist() == pytest.approx([50.0])
    assert model.fixed.weight.tolist() == [3.0]
    stream: Tensor = model.scale(model.embed(torch.arange(400)))
    assert float(stream.detach().std()) == pytest.approx(1.0, rel=0.03)
