"""A placement may own matrices, itself or by its norms: all that goes by roles takes them in by rule."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.config import ModelConfig, OptimConfig
from lightning_modules.initialization import initialize as initialize_ours
from lightning_modules.optimizers import make_optimizer
from lightning_modules.transformer import Transformer
from lightning_modules.width_scaling import width_scaling
from spannorm import Depth, Matrix, NormFactory, OwnsMatrices, PreNorm, RMSNorm, Sublayer, initialize, plain_init
from spannorm.import_path import is_import_path
from tests.support.models import VOCAB_SIZE, tiny_config
from tools.plan import Mesh, num_cut, num_held

DIM = 32
NAMES = ("drawn", "zero", "left_to_the_init")


class Gated(RMSNorm):
    """A norm with a matrix of low rank, of which it says nothing."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps=eps)
        self.gate = nn.Parameter(torch.full((dim, 4), 9.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (x[..., :4] @ self.gate.T).sigmoid()

    def matrices(self) -> Iterator[Matrix]:
        yield Matrix("residual", self.gate, 4, self.gate.size(0), width_is_explicit=True)


class Mixing(PreNorm):
    """PreNorm with matrices of its own, scalars, and a bias of two dimensions, which is no matrix."""

    def __init__(self, depth: Depth, norm: NormFactory, final_norm: bool | None = None) -> None:
        super().__init__(depth, norm, final_norm)
        for name in NAMES:
            self.register_parameter(name, nn.Parameter(torch.full((norm.dim, norm.dim), 9.0)))
        self.bias, self.scalar = nn.Parameter(torch.full((2, 2), 9.0)), nn.Parameter(torch.full((1,), 9.0))

    def forward(self, x: Tensor, attn: Sublayer, ffn: Sublayer) -> Tensor:
        mixed = x @ (self.drawn + self.zero + self.left_to_the_init).T * self.scalar * self.bias.mean()
        return super().forward(mixed, attn, ffn)

    def matrices(self) -> Iterator[Matrix]:
        yield from super().matrices()
        for name, std in zip(NAMES, (0.5, 0.0, None), strict=True):
            weight = self.get_parameter(name)
            yield Matrix("residual", weight, weight.size(1), weight.size(0), std=std)


OWN: dict[str, Any] = {"placement": f"{__name__}.Mixing", "norm": f"{__name__}.Gated"}
EVERYWHERE = {"placement": "subln", "norm": f"{__name__}.Gated", "ffn": "moe", "moe": {"num_shared_experts": 1}}


def residual_names(model: Transformer) -> list[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[matrix.weight] for matrix in model.matrices() if matrix.role == "residual"]


def test_matrices_of_placements_and_of_every_norm_are_found_once() -> None:
    assert is_import_path(OWN["norm"])
    model = Transformer(tiny_config(**OWN), VOCAB_SIZE)
    ends = ("gate", *NAMES)
    assert sorted(residual_names(model)) == sorted(n for n, _ in model.named_parameters() if n.split(".")[-1] in ends)
    model = Transformer(tiny_config(**EVERYWHERE), VOCAB_SIZE)
    found = residual_names(model)
    assert sorted(found) == sorted(name for name, _ in model.named_parameters() if name.endswith(".gate"))
    assert (
        len({name.split("gate")[0].split(".", 2)[2] for name in found}) == 6
    )  # 3 of the placement's, attn's, 2 in ffn
    assert not isinstance(RMSNorm(8), OwnsMatrices)


def test_each_starts_as_it_says_or_as_the_init_says() -> None:
    model = Transformer(tiny_config(**OWN, init="plain", init_options={"std": 0.1}), VOCAB_SIZE)
    initialize_ours(model)
    stds = {"drawn": 0.5, "zero": 0.0, "left_to_the_init": 0.1, "gate": 0.1}
    for name, parameter in model.blocks[0].placement.named_parameters():
        last = name.split(".")[-1]
        if last in stds:
            rel = 5 / (2 * parameter.numel()) ** 0.5
            assert parameter.detach().std().item() == pytest.approx(stds[last], rel=rel), name
        else:
            assert bool((parameter == (9.0 if last in ("bias", "scalar") else 1.0)).all()), name


def test_what_starts_at_zero_takes_no_random_numbers() -> None:
    """A placement that owns nothing, and one whose matrices start at zero, leave all others the same numbers."""
    models = [
        Transformer(tiny_config(placement=name, init="plain"), VOCAB_SIZE) for name in ("prenorm", __name__ + ".Zero")
    ]
    for model in models:
        torch.manual_seed(5)
        initialize_ours(model)
    others = dict(models[1].named_parameters())
    assert all(torch.equal(parameter, others[name]) for name, parameter in models[0].named_parameters())


class Zero(PreNorm):
    def __init__(self, depth: Depth, norm: NormFactory, final_norm: bool | None = None) -> None:
        super().__init__(depth, norm, final_norm)
        self.zero = nn.Parameter(torch.ones(norm.dim, norm.dim))

    def matrices(self) -> Iterator[Matrix]:
        yield Matrix("residual", self.zero, self.zero.size(1), self.zero.size(0), std=0.0)


def test_they_are_a_kind_of_their_own_and_what_is_no_matrix_is_norm() -> None:
    model = Transformer(tiny_config(**OWN), VOCAB_SIZE)
    names = {parameter: name for name, parameter in model.named_parameters()}
    kinds = {names[parameter]: kind for _, kind, parameter in model.parameter_groups()}
    assert set(kinds) == set(names.values())
    for name, kind in kinds.items():
        last = name.split(".")[-1]
        if ".placement." in name:
            assert kind == ("residual" if last in ("gate", *NAMES) else "norm"), name
    model = Transformer(tiny_config(**EVERYWHERE), VOCAB_SIZE)
    names = {parameter: name for name, parameter in model.named_parameters()}
    kinds = {names[parameter]: kind for _, kind, parameter in model.parameter_groups()}
    assert {kind for name, kind in kinds.items() if name.endswith("gate")} == {"residual"}
    assert {kind for name, kind in kinds.items() if name.endswith(("w1", "w2", "v1"))} == {"experts"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_they_decay_unless_their_group_says_otherwise_and_muon_leaves_them_to_adamw(optimizer: str) -> None:
    model = Transformer(tiny_config(**OWN), VOCAB_SIZE)
    for groups, expected in (({}, (1e-2, 0.2)), ({"residual": {"lr_factor": 0.5, "weight_decay": 0.0}}, (5e-3, 0.0))):
        optim = OptimConfig(optimizer=optimizer, lr=1e-2, weight_decay=0.2, groups=groups)
        made = make_optimizer(model, optim)
        group_of = {id(p): group for group in made.param_groups for p in group["params"]}
        for name, parameter in model.blocks[0].placement.named_parameters():
            group, owned = group_of[id(parameter)], name.split(".")[-1] in ("gate", *NAMES)
            assert (group["lr"], group["weight_decay"]) == (expected if owned else (1e-2, 0.0)), name
            assert group.get("matrix_rows", 0) == 0


@pytest.mark.parametrize("kind", ["mup", "standard"])
def test_width_scaling_divides_their_rate_by_what_grows_and_leaves_their_own_start(kind: str) -> None:
    config = ModelConfig(**{**OWN, "dim": 128, "num_layers": 1, "init": "plain"})
    optim = OptimConfig(lr=1e-2, weight_decay=0.1, width_scaling=kind, base_width=32)
    scaling, model = width_scaling(config, optim), Transformer(config, VOCAB_SIZE)
    initialize_ours(model, scaling)
    group_of = {id(p): group for group in make_optimizer(model, optim).param_groups for p in group["params"]}
    placement = model.blocks[0].placement
    factors = {"drawn": (0.5, 0.25), "left_to_the_init": (0.02 * 0.5, 0.25), "norm_attn.gate": (0.02, 1.0)}
    for name, (std, lr) in factors.items():
        parameter = placement.get_parameter(name)
        assert parameter.detach().std().item() == pytest.approx(std, rel=0.1), name
        assert group_of[id(parameter)]["lr"] == pytest.approx(1e-2 * lr), name


def test_tensor_parallelism_leaves_them_whole() -> None:
    model = Transformer(tiny_config(**{**EVERYWHERE, "placement": OWN["placement"], "ffn": "dense"}), VOCAB_SIZE)
    plain = Transformer(tiny_config(placement="prenorm"), VOCAB_SIZE)
    assert num_cut(model.blocks[0]) == num_cut(plain.blocks[0])
    mesh = Mesh(data=1, tensor=2, sharded=True, reduced=False)
    extra = model.num_parameters()[0] - plain.num_parameters()[0]
    assert num_held(model, mesh) - num_held(plain, mesh) == extra


class Strangers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Mixing(Depth(1, 1), NormFactory(OWN["norm"], DIM))
        self.linear = nn.Linear(DIM, DIM, bias=False)


def test_a_strangers_model_says_no_role_of_what_the_placement_owns() -> None:
    model = Strangers()
    drawn = initialize(model, plain_init(1, std=0.1), {"linear.weight": "query"})
    roles = {name: matrix.role for name, matrix in drawn.items()}
    assert roles.pop("linear.weight") == "query"
    assert set(roles.values()) == {"residual"}
    assert {name.split(".")[-1] for name in roles} == {"gate", *NAMES}
    assert bool((model.block.zero == 0).all())
    assert bool((model.block.bias == 9).all())
    assert model.block.drawn.detach().std().item() == pytest.approx(0.5, rel=0.12)
