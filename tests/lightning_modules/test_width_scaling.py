"""Width scaling: factors against the published tables, sizes against width, and the best learning rate."""

import lightning as L
import pytest
import torch

from core.errors import ConfigError
from datamodules.python_stdlib import PythonStdlib
from lightning_modules.config import ModelConfig, MoEConfig, OptimConfig
from lightning_modules.initialization import initialize
from lightning_modules.language_module import LanguageModule
from lightning_modules.optim import make_optimizer
from lightning_modules.transformer import Transformer
from lightning_modules.width_scaling import width_scaling
from tools.coordinate_check import STEPS, check, spread

# Four times the base width: (std, learning rate) of each role against the base width's, and the logits' multiplier.
EXPECTED = {
    "none": ({role: (1.0, 1.0) for role in ("hidden", "head", "embedding", "router")}, 1.0),
    "mup": ({"hidden": (0.5, 0.25), "head": (1.0, 1.0), "embedding": (1.0, 1.0), "router": (0.25, 0.25)}, 0.25),
    "standard": ({"hidden": (0.5, 0.25), "head": (0.5, 0.25), "embedding": (1.0, 1.0), "router": (0.5, 0.25)}, 1.0),
}


def moe_model(dim: int) -> ModelConfig:
    experts = MoEConfig(num_experts=8, expert_dim=2 * dim)
    return ModelConfig(init="plain", num_layers=1, dim=dim, num_heads=dim // 32, ffn="moe", moe=experts)


@pytest.mark.parametrize("kind", EXPECTED)
def test_std_and_learning_rate_follow_the_table(kind: str) -> None:
    config = moe_model(dim=256)
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
    config = moe_model(dim=64)
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


def test_a_pinned_expert_width_is_not_scaled() -> None:
    config = ModelConfig(ffn="moe", dim=256, num_heads=8, num_layers=1, moe=MoEConfig(expert_dim=128))
    scaling = width_scaling(config, OptimConfig(width_scaling="mup", base_width=64, base_ffn_width=128))
    factors = {matrix.role: scaling.lr_factor(matrix) for matrix in Transformer(config, 32).matrices()}
    assert factors["ffn_down"] == 1.0
    assert factors["ffn_up"] == 0.25


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


@pytest.mark.slow
def test_the_best_learning_rate_at_a_small_width_is_the_best_at_a_large_one(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    rates = [1.5e-4, 6e-4, 2.4e-3, 9.6e-3, 3.84e-2]
    root = str(tmp_path_factory.mktemp("corpus"))

    def final_loss(width: int, lr: float) -> float:
        L.seed_everything(0, verbose=False)
        data = PythonStdlib(root=root, seq_len=64, batch_size=8, val_batches=32)
        model = {"placement": "prenorm", "num_layers": 2, "dim": width, "num_heads": width // 32}
        optim = {"lr": lr, "warmup_steps": 20, "width_scaling": "mup", "base_width": 64}
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
