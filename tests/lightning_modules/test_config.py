"""What the typed configuration refuses, and the widths that it derives."""

from typing import Any

import pytest

from core.errors import ConfigError
from lightning_modules.config import ModelConfig, MoEConfig, OptimConfig, parse, settings
from tests.support.models import tiny_config

NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "field", "valid"),
    [
        ({"num_layer": 3}, "num_layer", "did you mean num_layers?"),
        ({"moe": {"topk": 1}}, "moe.topk", "did you mean top_k?"),
        ({"dim": "wide"}, "dim", "an integer"),
        ({"dim": 48.5}, "dim", "an integer"),
        ({"dim": None}, "dim", "an integer"),
        ({"norm_eps": "tiny"}, "norm_eps", "a number"),
        ({"moe": {"num_experts": "many"}}, "moe.num_experts", "an integer"),
        ({"moe": {"normalize_weights": "perhaps"}}, "moe.normalize_weights", "true or false"),
        ({"num_layers": 0}, "num_layers", "an integer >= 1"),
        ({"num_heads": 0}, "num_heads", "an integer >= 1"),
        ({"dim": 0}, "dim", "an integer >= 1"),
        ({"ffn_dim": 0}, "ffn_dim", "an integer >= 1 or null"),
        ({"norm_eps": 0.0}, "norm_eps", "a number > 0"),
        ({"norm_eps": NAN}, "norm_eps", "a number > 0"),
        ({"init_truncation": 0.0}, "init_truncation", "a number > 0 or null"),
        ({"init_truncation": NAN}, "init_truncation", "a number > 0 or null"),
        ({"rope_theta": -1.0}, "rope_theta", "a number > 0"),
        ({"dim": 36, "num_heads": 8}, "dim", "a multiple of 2 x model.num_heads=8"),  # 4.5 a head
        ({"dim": 36, "num_heads": 4}, "dim", "a multiple of 2 x model.num_heads=4"),  # 9 a head
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads", "a divisor of model.num_heads=4, or null"),
        ({"num_heads": 4, "num_kv_heads": 8}, "num_kv_heads", "a divisor of model.num_heads=4, or null"),
        ({"num_heads": 4, "num_kv_heads": 0}, "num_kv_heads", "a divisor of model.num_heads=4, or null"),
        ({"head_dim": 7}, "head_dim", "an even integer >= 2 (RoPE turns pairs), or null"),
        ({"head_dim": 0}, "head_dim", "an even integer >= 2"),
        ({"head_dim": 2**17, "num_heads": 32}, "head_dim", "at most 65,536"),
        ({"qk_norm": "heads"}, "qk_norm", "one of head, none, width (did you mean head?)"),
        ({"qkv_bias": "some"}, "qkv_bias", "true or false"),
        ({"vocab_size": 0}, "vocab_size", "an integer >= 1 or null"),
        ({"vocab_size": 2**25}, "vocab_size", "at most 16,777,217"),
        ({"moe": {"num_experts": 0}}, "moe.num_experts", "an integer >= 1"),
        ({"moe": {"num_experts": 2, "top_k": 3}}, "moe.top_k", "an integer from 1 to model.moe.num_experts=2"),
        ({"moe": {"top_k": 0}}, "moe.top_k", "an integer from 1"),
        ({"moe": {"expert_dim": 0}}, "moe.expert_dim", ">= 1 or null"),
        ({"moe": {"shared_expert_dim": 8}}, "moe.shared_expert_dim", "null, or model.moe.num_shared_experts >= 1"),
        ({"moe": {"shared_expert_weighted_sum": True}}, "moe.shared_expert_weighted_sum", "num_shared_experts >= 1"),
        ({"moe": {"jitter": 1.0}}, "moe.jitter", "a number in [0, 1)"),
        ({"moe": {"load_balancing_weight": -1.0}}, "moe.load_balancing_weight", "a number >= 0"),
        ({"moe": {"z_loss_weight": NAN}}, "moe.z_loss_weight", "a number >= 0"),
    ],
    ids=str,
)
def test_impossible_models_are_refused_by_field(values: dict[str, Any], field: str, valid: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(ModelConfig, "model", values)
    assert error.value.field == f"model.{field}"
    assert valid in error.value.valid
    assert str(error.value).startswith(f"model.{field}=")


@pytest.mark.parametrize(
    ("values", "field", "valid"),
    [
        ({"learning_rate": 1.0}, "learning_rate", "no such field; one of"),
        ({"lr": "fast"}, "lr", "a number"),
        ({"lr": -1.0}, "lr", "a number >= 0"),
        ({"weight_decay": NAN}, "weight_decay", "a number >= 0"),
        ({"warmup_steps": -1}, "warmup_steps", "a number >= 0"),
        ({"eps": 0.0}, "eps", "a number > 0"),
        ({"betas": [0.9, 1.0]}, "betas", "two numbers in [0, 1)"),
        ({"betas": [0.9]}, "betas", "two numbers in [0, 1)"),
        ({"betas": [0.9, 0.9, 0.9]}, "betas", "two numbers in [0, 1)"),
        ({"min_lr_ratio": 1.1}, "min_lr_ratio", "a number in [0, 1]"),
        ({"decay_fraction": -0.1}, "decay_fraction", "a number in [0, 1]"),
        ({"decay_shape": "exponental"}, "decay_shape", "did you mean exponential?"),
        ({"decay_shape": "exponential", "min_lr_ratio": 0.0}, "min_lr_ratio", "optim.decay_shape=exponential"),
    ],
    ids=str,
)
def test_impossible_optimizers_are_refused_by_field(values: dict[str, Any], field: str, valid: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(OptimConfig, "optim", values)
    assert error.value.field == f"optim.{field}"
    assert valid in error.value.valid


def test_plain_values_become_frozen_dataclasses_of_the_declared_types() -> None:
    model = parse(ModelConfig, "model", {"dim": 64, "rope_theta": 500, "moe": {"top_k": 1}})
    assert model == ModelConfig(dim=64, rope_theta=500.0, moe=MoEConfig(top_k=1))
    assert isinstance(model.rope_theta, float)
    with pytest.raises(AttributeError):
        model.dim = 32  # type: ignore[misc]
    assert parse(OptimConfig, "optim", {"betas": [0.8, 0.9]}).betas == pytest.approx((0.8, 0.9))


@pytest.mark.parametrize(("top_k", "normalizes"), [(1, False), (2, True)])
def test_weights_are_normalized_by_default_where_there_are_several(top_k: int, normalizes: bool) -> None:
    assert parse(ModelConfig, "model", {"moe": {"top_k": top_k}}).moe.normalizes_weights is normalizes
    explicit = {"top_k": top_k, "normalize_weights": not normalizes}
    assert parse(ModelConfig, "model", {"moe": explicit}).moe.normalizes_weights is not normalizes


def test_a_saved_configuration_from_before_the_norms_options_means_what_it_then_did() -> None:
    saved = vars(tiny_config(norm="dyt")) | {"moe": vars(tiny_config().moe)}
    assert parse(ModelConfig, "model", saved).norm_options == {}
    del saved["norm_options"]
    former = {"alpha": 0.5, "alpha_attention": 0.5, "embedding_scale": None}
    assert parse(ModelConfig, "model", saved).norm_options == former
    assert parse(ModelConfig, "model", {**saved, "norm": "rmsnorm"}).norm_options == {}
    assert parse(ModelConfig, "model", {"norm": "dyt"}).norm_options == {}, "written by hand, today"


def test_settings_are_named_as_on_the_command_line() -> None:
    found = settings(tiny_config(init_options={"std": 0.1}, moe={"top_k": 1}), "model")
    assert (found["model.dim"], found["model.init_options"]) == (32, {"std": 0.1})
    assert found["model.moe.normalize_weights"] is False
    assert "model.moe" not in found
    assert settings(OptimConfig(), "optim")["optim.betas"] == (0.9, 0.95)


@pytest.mark.parametrize(("dim", "hidden"), [(96, 256), (128, 352), (48, 128), (32, 96)])
def test_ffn_width_defaults_to_8_thirds_dim_in_sixteens(dim: int, hidden: int) -> None:
    config = tiny_config(dim=dim, ffn_dim=None, moe={"expert_dim": None})
    assert config.hidden_dim == config.expert_hidden_dim == hidden


def test_derived_widths() -> None:
    config = tiny_config(dim=64, num_heads=8, ffn_dim=40, moe={"expert_dim": None})
    assert (config.head_width, config.kv_heads, config.hidden_dim, config.expert_hidden_dim) == (8, 8, 40, 40)
    config = tiny_config(dim=31, num_heads=4, head_dim=6)
    assert (config.head_width, config.attention_width) == (6, 24)
    config = tiny_config(num_heads=4, num_kv_heads=2, ffn_dim=40, moe={"expert_dim": 24})
    assert (config.kv_heads, config.hidden_dim, config.expert_hidden_dim) == (2, 40, 24)
