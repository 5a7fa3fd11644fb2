"""Options that were set without effect are named in a line each; defaults are not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.config import ModelConfig, OptimConfig, parse
from lightning_modules.transformer import Transformer
from lightning_modules.unused_options import describe_unused
from spannorm import PLACEMENTS
from tests.support.models import VOCAB_SIZE, tiny_config, tokens
from tests.support.runs import tiny_job, train

SILENT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    *(({"ffn": "moe", "moe": {"balancing": kind}}, {}) for kind in ("loss", "bias", "none")),
    *(({"ffn": "moe", "moe": {"balancing": kind, "load_balancing_weight": 0.0}}, {}) for kind in ("loss", "bias")),
    ({"ffn": "moe", "moe": {"num_experts": 2, "top_k": 2}}, {}),  # balancing=loss is the default, merely not needed
    ({"ffn": "moe", "moe": {"load_balancing_weight": 0.02}}, {}),
    ({"ffn": "moe", "moe": {"balancing": "bias", "bias_update_rate": 0.01}}, {}),
    ({"activation_checkpointing": True, "activation_checkpoint_every": 2}, {}),
    ({}, {"schedule": "wsd", "decay_fraction": 0.1, "decay_shape": "exponential"}),
    ({}, {"width_scaling": "mup", "base_width": 64}),
    ({}, {"min_lr_ratio": 0.0}),
    ({}, {"optimizer": "torch.optim.SGD", "betas": [0.9, 0.95]}),  # the default, as a configuration has it
    ({"norm": "layernorm", "norm_eps": 1e-5}, {}),
    *(({"norm": "dyt", "norm_eps": 1e-3, "placement": name}, {}) for name in ("hc", "mhc", "ihc", "attnres")),
    *(({"placement": "hc", "placement_options": options}, {}) for options in ({"static": True}, {"scale": 0.5})),
    ({}, {"schedule": "wsd", "decay_fraction": 0.0}),
    ({"ffn_dim": 48}, {}),
    ({"ffn": "moe", "ffn_dim": 48}, {}),
    *(
        ({"ffn": "moe", "ffn_dim": 48, "moe": {"expert_dim": 16, **moe}}, {})
        for moe in ({"first_dense_layers": 1}, {"layer_interval": 2})
    ),
]
UNUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    *(
        (
            {"ffn": "moe", "moe": {"balancing": kind, "load_balancing_weight": 0.02}},
            {},
            f"model.moe.load_balancing_weight=0.02 has no effect: model.moe.balancing={kind}",
        )
        for kind in ("bias", "none")
    ),
    *(
        (
            {"ffn": "moe", "moe": {"balancing": kind, "bias_update_rate": 0.01}},
            {},
            f"model.moe.bias_update_rate=0.01 has no effect: model.moe.balancing={kind}",
        )
        for kind in ("loss", "none")
    ),
    (
        {"ffn": "moe", "moe": {"balancing": "bias", "num_experts": 2, "top_k": 2}},
        {},
        "model.moe.balancing=bias has no effect: with model.moe.top_k=num_experts=2",
    ),
    (
        {"ffn": "moe", "moe": {"load_balancing_weight": 0.1, "num_experts": 2, "top_k": 2}},
        {},
        "model.moe.load_balancing_weight=0.1 has no effect: with model.moe.top_k=num_experts=2",
    ),
    ({"ffn": "moe", "moe": {"num_experts": 1, "top_k": 1, "jitter": 0.1}}, {}, "model.moe.jitter=0.1 has no effect"),
    ({"moe": {"num_experts": 16, "top_k": 4}}, {}, "model.moe.num_experts=16, model.moe.top_k=4 without effect"),
    (
        {"activation_checkpoint_every": 2},
        {},
        "model.activation_checkpoint_every=2 has no effect: model.activation_checkpointing",
    ),
    (
        {"placement": "hc", "placement_options": {"static": True, "scale": 0.5}},
        {},
        "model.placement_options.scale=0.5 has no effect: with model.placement_options.static=true",
    ),
    (
        {"placement": "hc", "placement_options": {"static": True}, "norm": "derf", "norm_eps": 1e-3},
        {},
        "model.norm_eps=0.001 has no effect: model.norm=derf",
    ),
    *(({"norm": kind, "norm_eps": 1e-3}, {}, "model.norm_eps=0.001 has no effect") for kind in ("dyt", "derf", "none")),
    ({"norm": "none", "placement": "prenorm", "qk_norm": "head"}, {}, "model.qk_norm=head has no effect: model.norm"),
    ({"ffn": "moe", "ffn_dim": 48, "moe": {"expert_dim": 16}}, {}, "model.ffn_dim=48 has no effect: all FFNs"),
    *(
        ({}, {"schedule": "wsd", "decay_fraction": 0.0, name: value}, f"optim.{name}={value} has no effect: with")
        for name, value in (("min_lr_ratio", 0.01), ("decay_shape", "exponential"))
    ),
    *(({}, {"decay_fraction": 0.1, "schedule": kind}, "optim.decay_fraction=0.1") for kind in ("cosine", "constant")),
    ({}, {"decay_shape": "exponential"}, "optim.decay_shape=exponential has no effect: optim.schedule=cosine"),
    ({}, {"min_lr_ratio": 0.0, "schedule": "constant"}, "optim.min_lr_ratio=0.0 has no effect"),
    ({}, {"base_width": 64}, "optim.base_width=64 has no effect: optim.width_scaling is none"),
    ({}, {"base_num_layers": 4}, "optim.base_num_layers=4 has no effect: optim.depth_scaling is none"),
    ({}, {"base_ffn_width": 64}, "optim.base_ffn_width=64 has no effect: optim.width_scaling is none"),
]


def described(model: dict[str, Any], optim: dict[str, Any]) -> list[str]:
    return describe_unused(parse(ModelConfig, "model", model), parse(OptimConfig, "optim", optim))


@pytest.mark.parametrize(("model", "optim"), SILENT, ids=str)
def test_a_default_that_is_not_used_is_no_news(model: dict[str, Any], optim: dict[str, Any]) -> None:
    assert described(model, optim) == []


@pytest.mark.parametrize(("model", "optim", "line"), UNUSED, ids=str)
def test_what_was_set_without_effect_is_named(model: dict[str, Any], optim: dict[str, Any], line: str) -> None:
    (found,) = described(model, optim)
    assert found.startswith(line)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_eps_is_said_to_have_no_effect_where_it_has_none(name: str) -> None:
    """Under norms that divide by nothing: what the model computes with another eps decides."""
    if "dyt" not in PLACEMENTS[name].norms:
        return
    values = {"placement": name, "norm": "dyt", "placement_options": {"start": "uniform"} if name == "mhc" else {}}
    model, sequence = Transformer(tiny_config(**values), VOCAB_SIZE), tokens(1, 5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    logits = []
    for eps in (1e-6, 0.3):
        other = Transformer(tiny_config(**values, norm_eps=eps), VOCAB_SIZE)
        other.load_state_dict(model.state_dict())
        logits.append(other(sequence)[0])
    assert torch.equal(*logits) == bool(described({**values, "norm_eps": 0.3}, {}))


def test_a_run_says_it_once(tmp_path: Path) -> None:
    job = tiny_job("model.ffn=moe", "model.moe.balancing=none", "model.moe.load_balancing_weight=0.02", "logger=csv")
    finished = train(tmp_path, *job)
    assert finished.code == 0, finished.err
    assert (finished.out + finished.err).count("model.moe.load_balancing_weight=0.02 has no effect") == 1
