"""Each scheme's constants and each depth-dependent init's factors, for three depths, as literals."""

from typing import Any

import pytest
import torch

from lightning_modules.initialization import resolve_init
from lightning_modules.transformer import Transformer
from spannorm import PLACEMENTS, NormFactory
from spannorm.matrices import Matrix, Role
from spannorm.placements.base import Depth
from spannorm.placements.postnorm import PostNorm
from tests.support.models import VOCAB_SIZE, tiny_config, tokens

# Square, so that Xavier and fan-in agree: both are 1/8.
FAN, STD = 64, 0.125
BLOCK: tuple[Role, ...] = ("query", "key", "value", "attn_out", "ffn_up", "ffn_down")


def make(name: str, index: int, total: int, **options: Any) -> Any:
    return PLACEMENTS[name](Depth(index, total), NormFactory("rmsnorm", 8, 1e-6), **options)


@pytest.mark.parametrize(("total", "alpha"), [(6, 1.861209718), (32, 2.828427125), (100, 3.760603093)])
def test_deepnorm_amplifies_by_the_fourth_root_of_two_blocks(total: int, alpha: float) -> None:
    assert [make("deepnorm", index, total).alpha for index in (1, 2, total)] == pytest.approx([alpha] * 3)


@pytest.mark.parametrize(
    ("alpha", "values"),
    [
        ("2L", {6: 12.0, 32: 64.0, 100: 200.0}),
        ("sqrt", {6: 3.464101615, 32: 8.0, 100: 14.142135624}),
        (5, {6: 5, 32: 5}),
    ],
)
def test_keel_amplifies_by_the_number_of_sublayers_its_root_or_a_constant(alpha: Any, values: dict[int, float]) -> None:
    for total, value in values.items():
        assert [make("keel", index, total, alpha=alpha).alpha for index in (1, 2)] == pytest.approx([value] * 2)
        eased = [make("keel", index, total, alpha=alpha, ease_in=True).alpha for index in (1, 2)]
        assert eased == pytest.approx([1.0, value])
    assert len(list(make("keel", 1, 6, ease_in=True).parameters())) == 3
    assert len(list(make("keel", 2, 6, ease_in=True).parameters())) == 4


@pytest.mark.parametrize(
    ("total", "fraction", "count"),
    [(4, 0.25, 1), (12, 0.25, 3), (30, 0.25, 7), (100, 0.29, 29), (5, 0.0, 0), (5, 1.0, 5)],
)
def test_mixln_starts_with_a_fraction_of_postnorm(total: int, fraction: float, count: int) -> None:
    inner = [make("mixln", index, total, post_fraction=fraction).inner for index in range(1, total + 1)]
    assert [isinstance(placement, PostNorm) for placement in inner] == [True] * count + [False] * (total - count)


@pytest.mark.parametrize(
    ("name", "options", "scales"),
    [
        ("lnscaling", {}, {1: 1.0, 4: 0.5, 64: 0.125}),
        ("siamesenorm", {}, {1: 1.0, 4: 0.5, 64: 0.125}),
        ("siamesenorm", {"count_sublayers": True}, {2: 0.5, 8: 0.25, 32: 0.125}),
    ],
)
def test_branches_shrink_with_the_root_of_the_index(
    name: str, options: dict[str, Any], scales: dict[int, float]
) -> None:
    for index, scale in scales.items():
        placement = make(name, index, 64, **options)
        assert placement.scale.item() == pytest.approx(scale)
        assert "scale" not in placement.state_dict()  # follows from the configuration


@pytest.mark.parametrize(
    ("init", "options", "factors", "targets"),
    [
        ("deepnorm", {}, {6: 0.379917843, 32: 0.25, 100: 0.188030155}, BLOCK[2:]),
        ("b2t", {}, {4: 0.5, 16: 0.25, 64: 0.125}, BLOCK),
        ("subln", {}, {1: 0.832554611, 12: 1.782709688, 64: 2.202732454}, BLOCK[2:]),
        ("megatron", {"std": STD}, {2: 0.5, 8: 0.25, 32: 0.125}, ("attn_out", "ffn_down")),
        ("scale_init", {}, {4: 0.5, 16: 0.25, 64: 0.125}, ("attn_out", "ffn_down")),
        ("scale_init", {"factor": "sublayers"}, {2: 0.5, 8: 0.25, 32: 0.125}, ("attn_out", "ffn_down")),
        ("deepscalelm", {}, {1: 1.0, 8: 0.5, 32: 0.25}, ("attn_out",)),
    ],
)
def test_inits_shrink_or_grow_their_matrices_with_depth(
    init: str, options: dict[str, Any], factors: dict[int, float], targets: tuple[str, ...]
) -> None:
    for num_layers, factor in factors.items():
        std = resolve_init(tiny_config(init=init, init_options=options, num_layers=num_layers))
        for role in BLOCK:
            if (init, role) != ("deepscalelm", "ffn_down"):
                expected = STD * (factor if role in targets else 1)
                assert std(Matrix(role, torch.empty(0), FAN, FAN)) == pytest.approx(expected), (num_layers, role)


@pytest.mark.parametrize("init", ["deepnorm", "b2t", "subln"])
def test_xavier_averages_fan_in_and_fan_out_in_the_blocks_only(init: str) -> None:
    std = resolve_init(tiny_config(init=init, num_layers=1))
    query = std(Matrix("query", torch.empty(0), 64, 16))
    assert query == pytest.approx(std(Matrix("query", torch.empty(0), 16, 64))) == pytest.approx(0.158113883)
    assert std(Matrix("embedding", torch.empty(0), 1, 64)) == 1.0
    assert std(Matrix("head", torch.empty(0), 64, 500)) == 0.125


def test_hybridnorm_draws_with_the_root_of_2_over_5_dim() -> None:
    config = tiny_config(placement="hybridnorm", dim=160, num_heads=4, num_kv_heads=2, num_layers=2)
    std, model = resolve_init(config), Transformer(config, VOCAB_SIZE)
    for matrix in model.matrices():  # sqrt(2 / 800) = 0.05, outputs by sqrt(4) less
        assert std(matrix) == pytest.approx(0.025 if matrix.role in ("attn_out", "ffn_down") else 0.05), matrix.role


def test_deepscalelm_gives_branches_of_variance_2_over_l() -> None:
    config = tiny_config(placement="prenorm", init="deepscalelm", dim=256, ffn_dim=512, num_layers=8)
    std, model = resolve_init(config), Transformer(config, VOCAB_SIZE)
    for matrix in model.matrices():
        torch.nn.init.normal_(matrix.weight, std=std(matrix))
    x, same = torch.randn(4, 64, 256), torch.randn(1, 1, 256).expand(4, 16, 256)
    block = model.blocks[0]
    assert block.ffn(x)[0].var().item() == pytest.approx(0.25, rel=0.05)
    rope = torch.ones(16, 64), torch.zeros(16, 64)
    assert block.attn(same, rope).var().item() == pytest.approx(0.25, rel=0.4)  # one token seen 64 times


def test_rezero_starts_as_the_identity_and_opens() -> None:
    model = Transformer(tiny_config(placement="rezero", norm="none"), VOCAB_SIZE)
    sequence = tokens(2, 5)
    torch.testing.assert_close(model(sequence)[0], model.head(model.embedding(sequence)))
    model(sequence)[0].square().mean().backward()
    gates = [parameter for name, parameter in model.named_parameters() if name.endswith("gate")]
    assert len(gates) == 2
    assert all(gate.grad is not None and gate.grad.abs() > 0 for gate in gates)
