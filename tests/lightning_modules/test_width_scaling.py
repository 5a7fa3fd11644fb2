"""Width scaling: factors against the published tables, sizes against width, and the best learning rate."""

from collections import defaultdict
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir

from core.build import build
from core.errors import ConfigError
from datamodules.python_stdlib import PythonStdlib
from lightning_modules.composing import register_schemas
from lightning_modules.config import ModelConfig, MoEConfig, OptimConfig
from lightning_modules.initialization import initialize
from lightning_modules.language_module import LanguageModule
from lightning_modules.optimizers import make_optimizer
from lightning_modules.transformer import Transformer
from lightning_modules.width_scaling import width_scaling
from tests.support.models import make_module
from tools.coordinate_check import STEPS, check, sizes_at, spread

ROOT = Path(__file__).parents[2]

# Four times the base width: (std, learning rate) of each role against the base width's, and the logits' multiplier.
EXPECTED = {
    "none": ({role: (1.0, 1.0) for role in ("hidden", "head", "embedding", "router")}, 1.0),
    "mup": ({"hidden": (0.5, 0.25), "head": (1.0, 1.0), "embedding": (1.0, 1.0), "router": (0.25, 0.25)}, 0.25),
    "standard": ({"hidden": (0.5, 0.25), "head": (0.5, 0.25), "embedding": (1.0, 1.0), "router": (0.5, 0.25)}, 1.0),
}


def moe_model(dim: int, num_shared_experts: int = 0) -> ModelConfig:
    moe = MoEConfig(num_experts=8, num_shared_experts=num_shared_experts)
    return ModelConfig(init="plain", num_layers=1, dim=dim, num_heads=dim // 32, ffn="moe", moe=moe)


@pytest.mark.parametrize("num_shared_experts", [0, 1, 2])
@pytest.mark.parametrize("kind", EXPECTED)
def test_std_and_learning_rate_follow_the_table(kind: str, num_shared_experts: int) -> None:
    config = moe_model(256, num_shared_experts)
    optim = OptimConfig(lr=1e-2, weight_decay=0.1, width_scaling=kind, base_width=64)
    scaling = width_scaling(config, optim)
    model = Transformer(config, 512, scaling.output_multiplier)
    initialize(model, scaling)
    rates = {id(p): group for group in make_optimizer(model, optim).param_groups for p in group["params"]}
    factors, multiplier = EXPECTED[kind]
    for matrix in model.matrices():
        std, lr = factors.get(matrix.role, factors["hidden"])
        assert matrix.weight.std().item() == pytest.approx(0.02 * std, rel=0.05), matrix.role
        group = rates[id(matrix.weight)]
        assert group["lr"] == pytest.approx(1e-2 * lr)
        decay = 0.0 if matrix.role == "embedding" else 0.1 * 1e-2
        assert group["lr"] * group["weight_decay"] == pytest.approx(decay), "decay a step does not depend on width"
    norm = model.blocks[0].placement.norm_attn.weight
    assert rates[id(norm)]["lr"] == 1e-2
    assert rates[id(norm)]["weight_decay"] == 0.0

    tokens = torch.randint(512, (1, 8))
    logits = model(tokens)[0]
    model.output_multiplier = 1.0
    torch.testing.assert_close(logits, multiplier * model(tokens)[0])


def test_every_parameter_is_in_exactly_one_group() -> None:
    config = moe_model(64, num_shared_experts=1)
    model = Transformer(config, 32)
    groups = make_optimizer(model, OptimConfig(width_scaling="mup", base_width=32)).param_groups
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in model.parameters())


def test_fan_in_init_is_the_same_under_mup_as_without_but_for_outputs() -> None:
    """1/sqrt(fan_in) scales with the width already; counting the width twice would be the mistake."""
    config = ModelConfig(init="fan_in", num_layers=1, dim=256, num_heads=8)
    model = Transformer(config, 64)
    initialize(model, width_scaling(config, OptimConfig(width_scaling="mup", base_width=64)))
    for matrix in model.matrices():
        expected = {"head": 64**-0.5, "embedding": 1.0}.get(matrix.role, matrix.fan_in**-0.5)
        assert matrix.weight.std().item() == pytest.approx(expected, rel=0.03), matrix.role


# Of a model four times as wide as the base, by layer: the fan-in of its down matrix over that at the base.
DOWN = [
    (["model=dense"], {"ffn": 4}),
    (["model=dense", "model.ffn_dim=256"], {"ffn": 1}),
    (["model=dense", "optim.base_ffn_width=172"], {"ffn": 8}),  # 1376, derived from dim 512
    (["model=moe"], {"mlp": 1}),  # pins expert_dim
    (["model=moe", "optim.base_ffn_width=64"], {"mlp": 2}),
    (["model=moe", "model.moe.expert_dim=null"], {"mlp": 4}),
    (["model=moe", "model.moe.expert_dim=null", "model.ffn_dim=256"], {"mlp": 1}),
    (["model=moe", "model.moe.first_dense_layers=1"], {"ffn": 4, "mlp": 1}),
    (["model=moe", "model.moe.num_shared_experts=2"], {"shared_expert": 1, "mlp": 1}),
    (
        ["model=moe", "model.moe.num_shared_experts=2", "optim.base_ffn_width=64"],
        {"shared_expert": 2, "mlp": 2},
    ),
    (
        ["model=moe", "model.moe.num_shared_experts=2", "model.moe.expert_dim=null"],
        {"shared_expert": 4, "mlp": 4},
    ),
    (
        ["model=moe", "model.moe={num_shared_experts: 1, expert_dim: null, shared_expert_dim: 256}"],
        {"shared_expert": 1, "mlp": 4},
    ),
]


def composed(*overrides: str) -> LanguageModule:
    """The module of a run with these overrides, four times as wide as its base; without weights."""
    register_schemas()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        mup = ("optim.width_scaling=mup", "optim.base_width=128")
        config = compose("train", [*overrides, "model.dim=512", "model.num_heads=16", *mup])
    module: LanguageModule = build(config, "module", vocab_size=32)
    return module


@pytest.mark.parametrize(("overrides", "down"), DOWN, ids=" ".join)
def test_every_matrix_counts_with_its_own_fan_in(overrides: list[str], down: dict[str, int]) -> None:
    module = composed(*overrides)
    with torch.device("meta"):
        model = Transformer(module.model_config, 32)
    names, seen = {id(weight): name.removesuffix(".weight") for name, weight in model.named_parameters()}, set()
    for matrix in model.matrices():
        if matrix.role not in ("ffn_up", "ffn_down"):
            continue
        layer = names[id(matrix.weight)].split(".")[-2]
        m = down[layer] if matrix.role == "ffn_down" else 4
        assert module.width_scaling.lr_factor(matrix) == pytest.approx(1 / m)
        assert module.width_scaling.std_factor(matrix) == pytest.approx(m**-0.5)
        at_base = module.width_scaling.at_base(matrix)
        fans = (matrix.fan_in / m, matrix.fan_out / (4 if matrix.role == "ffn_down" else down[layer]))
        assert (at_base.fan_in, at_base.fan_out) == pytest.approx(fans)
        seen.add(layer)
    assert seen == set(down)


# Of such a model with gated norms, by norm: the fan-in of the gate's first matrix over that at the base.
GATES = [
    ([], {"placement": 4, "attn.inner_norm": 4, "ffn.inner_norm": 4}),
    (["model.ffn_dim=48"], {"placement": 4, "attn.inner_norm": 4, "ffn.inner_norm": 1}),
    (["optim.base_ffn_width=172"], {"placement": 4, "attn.inner_norm": 4, "ffn.inner_norm": 8}),
    (["model.qk_norm=head", "model.head_dim=64"], {"attn.projection_norms": 1}),
    (["model.qk_norm=width"], {"attn.projection_norms": 4}),
    (["model.placement=hybridnorm"], {"attn.projection_norms": 1}),  # heads are added, not widened
    (["model=moe", "model.moe.num_shared_experts=1"], {"mlp.inner_norm": 1, "shared_expert.inner_norm": 1}),
    (
        ["model=moe", "model.moe={num_shared_experts: 1, expert_dim: null, shared_expert_dim: 256}"],
        {"mlp.inner_norm": 4, "shared_expert.inner_norm": 1},
    ),
    (["model=moe", "optim.base_ffn_width=64"], {"mlp.inner_norm": 2}),
    (["model.placement=gr", "model.placement_options.rank=8"], {"placement": 4}),
]


@pytest.mark.parametrize(("overrides", "expected"), GATES, ids=lambda value: " ".join(value))
def test_a_gated_norm_counts_with_the_features_that_it_norms(overrides: list[str], expected: dict[str, int]) -> None:
    module = composed("model.placement=subln", "model.norm=gatednorm", *overrides)
    with torch.device("meta"):
        model = Transformer(module.model_config, 32)
    names, seen = {id(weight): name for name, weight in model.named_parameters()}, set()
    for matrix in model.matrices():
        name = names[id(matrix.weight)]
        if matrix.role != "residual":
            continue
        if name.endswith("up"):
            assert module.width_scaling.lr_factor(matrix) == 1, name
        for part, m in expected.items():
            if part in name and name.endswith("down"):
                assert module.width_scaling.lr_factor(matrix) == pytest.approx(1 / m), name
                seen.add(part)
    assert seen == set(expected)


@pytest.mark.parametrize(
    "override",
    [
        "model.moe.first_dense_layers=1",
        "model.moe.layer_interval=2",
        "model.moe={num_shared_experts: 1, shared_expert_dim: 64}",
    ],
)
def test_one_base_width_for_several_hidden_widths_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"optim\.base_ffn_width=64 .*this model has \d+, \d+"):
        composed("model=moe", override, "optim.base_ffn_width=64")


def test_the_module_draws_multiplies_and_steps_as_scaled(tmp_path: Path) -> None:
    optim = {"width_scaling": "mup", "base_width": 8, "lr": 1e-2, "warmup_steps": 4}
    module = make_module(optim, ffn="moe", init="plain")  # four times as wide, experts of pinned width
    assert module.model is not None
    assert module.model.output_multiplier == 0.25
    factors = {"embedding": (1, 1), "head": (1, 1), "router": (0.25, 0.25), "ffn_down": (1, 1)}
    weights: dict[str, list[torch.Tensor]] = defaultdict(list)
    for matrix in module.model.matrices():
        weights[matrix.role].append(matrix.weight)
    for role, drawn in weights.items():
        flat, std = torch.cat([weight.flatten() for weight in drawn]), factors.get(role, (0.5, 0.25))[0]
        assert flat.std().item() == pytest.approx(0.02 * std, rel=5 / (2 * len(flat)) ** 0.5), role

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    module.trainer = L.Trainer(accelerator="cpu", max_steps=10, default_root_dir=tmp_path, **quiet)  # type: ignore[arg-type]
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for warm_up in (0.25, 0.5):
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for role, drawn in weights.items():
            expected = 1e-2 * warm_up * factors.get(role, (0.5, 0.25))[1]
            assert [rates[id(weight)] for weight in drawn] == pytest.approx([expected] * len(drawn)), role
        optimizer.step()
        schedule.step()


def test_tied_embeddings_keep_their_scale_under_mup_and_are_refused_under_standard() -> None:
    config = ModelConfig(init="fan_in", dim=256, num_heads=8, num_layers=1, tie_embeddings=True)
    model = Transformer(config, 512)
    initialize(model, width_scaling(config, OptimConfig(width_scaling="mup", base_width=64)))
    assert model.embedding.weight.std().item() == pytest.approx(64**-0.5, rel=0.03)
    with pytest.raises(ConfigError, match="tie_embeddings"):
        width_scaling(config, OptimConfig(width_scaling="standard"))


@pytest.mark.parametrize("ffn", ["dense", "moe"])
@pytest.mark.parametrize(
    "widths", [(64, 256), pytest.param((64, 128, 256, 512, 1024), marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_sizes_do_not_depend_on_the_width_with_mup_and_do_without(ffn: str, widths: tuple[int, ...]) -> None:
    sizes = check(ffn, widths)
    for step in STEPS:
        for name in ("hidden", "logits"):
            for field in ("activation", "update"):
                assert spread(sizes, "mup", step, name, field) < 2, (name, field, step)
        assert spread(sizes, "none", step, "logits", "update") > 2, step
    if len(widths) > 2:  # later the final norm bounds it: two unrelated states of unit size are sqrt(2) apart
        assert spread(sizes, "none", STEPS[0], "hidden", "update") > 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_best_learning_rate_at_a_small_width_is_the_best_at_a_large_one_and_moves_without_scaling(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    rates = [1.5e-4, 6e-4, 2.4e-3, 9.6e-3, 3.84e-2]
    root = str(tmp_path_factory.mktemp("corpus"))

    def final_loss(width: int, lr: float, kind: str = "mup") -> float:
        L.seed_everything(0, verbose=False)
        data = PythonStdlib(root=root, seq_len=64, batch_size=8, val_batches=32)
        model = {"placement": "prenorm", "num_layers": 2, "dim": width, "num_heads": width // 32}
        optim = {"lr": lr, "warmup_steps": 20, "width_scaling": kind, "base_width": 64}
        module = LanguageModule(model, optim, data.vocab_size)
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=200,
            max_epochs=-1,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data)
        return float(trainer.validate(module, datamodule=data, verbose=False)[0]["val/loss"])

    best = {}
    for width in (64, 128, 256):
        losses = [final_loss(width, lr) for lr in rates]
        print(width, [round(loss, 4) for loss in losses])
        best[width] = rates[losses.index(min(losses))]
    assert len(set(best.values())) == 1, best
    assert min(rates) < best[64] < max(rates), "the best rate must be bracketed"

    smaller = rates[: rates.index(best[64]) + 1][-3:]  # without scaling it is one of these at the large width
    losses = [final_loss(256, lr, "none") for lr in smaller]
    print("none", 256, smaller, [round(loss, 4) for loss in losses])
    assert losses.index(min(losses)) < len(smaller) - 1


@pytest.mark.parametrize(
    ("optimizer", "options", "lr"),
    [
        pytest.param("lion", {}, 1e-3, id="lion"),
        pytest.param("muon", {}, 3e-3, id="muon", marks=pytest.mark.slow),
        pytest.param("muon", {"scale": "original"}, 2e-2, id="muon, original", marks=pytest.mark.slow),
    ],
)
def test_updates_of_other_optimizers_do_not_depend_on_the_width_with_mup(
    optimizer: str, options: dict[str, str], lr: float
) -> None:
    """Four times as wide; without it, the logits' change is more than twice as large."""
    groups = {role: {"lr_factor": 0.1} for role in ("embedding", "head", "norm")} if options else {}
    largest = {}
    for kind in ("none", "mup"):
        sizes = []
        for width in (64, 128, 256):
            model = ModelConfig(placement="prenorm", init="megatron", num_layers=2, dim=width, num_heads=width // 32)
            common = {"lr": lr, "groups": groups, "optimizer": optimizer, "optimizer_options": options}
            sizes += sizes_at(model, OptimConfig(width_scaling=kind, base_width=64, **common))  # type: ignore[arg-type]
        largest[kind] = {name: spread(sizes, kind, 5, name, "update") for name in ("hidden", "logits")}
    assert largest["none"]["logits"] > 2
    assert largest["mup"]["logits"] < 1.3
    assert largest["mup"]["hidden"] < 1.2
