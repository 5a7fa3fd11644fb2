"""The modeling file that is exported is an implementation of its own: it computes what the training's model does.

In float64, where equations that differ in an epsilon, a factor or an order of norms differ in every digit.
"""

from dataclasses import fields
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.config import ModelConfig, MoEConfig
from lightning_modules.transformer import Transformer
from spannorm import NORMS, PLACEMENTS
from tests.support.models import VOCAB_SIZE, tiny_config, tokens
from tools.exporting import remote_code
from tools.exporting.modeling_placement import PlacementConfig, PlacementForCausalLM

LAYERS = 3  # a first, a middle and a last block
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "spannorm": [{"first_norm": False}, {"final_norm": True}],
    "b2t": [{"last_skip": True}],
    "keel": [{"alpha": "sqrt"}, {"alpha": 3.0, "ease_in": True}],
    **{name: [{"gpas": True}] for name in ("prenorm", "sandwich", "lnscaling", "deepnorm")},
    "mixln": [{"post_fraction": 0.5, "gpas": True}],
    "hc": [{"streams": 3}, {"static": True, "streams": 2}],
    "mhc": [{"streams": 3, "iterations": 2}],
    "ihc": [{"streams": 5}],
    "gr": [{"streams": 3, "rank": 7}],
    "attnres": [{"group": 2}],
    "siamesenorm": [{"count_sublayers": True, "normed_sum": True}, {"head_norms": True}],
}
"""For each placement with options of its own, values that are not the defaults."""
DENSE: list[dict[str, Any]] = [
    {"num_kv_heads": 2},
    {"num_kv_heads": 1, "tie_embeddings": True},
    {"norm": "layernorm", "norm_eps": 1e-2},
    {"norm": "dyt", "norm_options": {"alpha": 0.3, "embedding_scale": "sqrt"}},
    {"norm": "gatednorm", "norm_options": {"rank": 3}},
    {"norm": "gatednorm", "norm_options": {"kind": "dyt", "kind_options": {"alpha": 0.3, "embedding_scale": 2.0}}},
    {"norm": "derf", "norm_options": {"alpha": 0.3, "shift": 0.2}},
    {"norm": "none"},
    {"rope_theta": 100.0, "num_heads": 2},
    {"ffn_dim": None, "dim": 48},
    {"qk_norm": "head", "head_dim": 6, "num_kv_heads": 2},
    {"qk_norm": "width", "norm": "layernorm"},
    {"qkv_bias": True, "vocab_size": VOCAB_SIZE},
    {"ffn": "mlp"},
    {"ffn": "mlp", "bias": True, "ffn_dim": None, "norm": "layernorm"},
    {"bias": True},
    {"num_layers": 1},
]
MIXTURES: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 3, "num_experts": 5},
    {"normalize_weights": False},
    {"expert_dim": None},
    {"expert_dim": 8, "num_shared_experts": 2},
    {"num_shared_experts": 1, "shared_expert_dim": 12, "shared_expert_weighted_sum": True},
    {"first_dense_layers": 1},
    {"layer_interval": 2},
    {"score": "sigmoid"},
    {"score": "sigmoid", "balancing": "bias"},
    {"balancing": "none", "z_loss_weight": 0.0},
    {"load_balancing_weight": 0.3, "z_loss_weight": 0.2},
    {"jitter": 0.3},
]
OWN_NORM = "tests.support.exports.OwnNorm"
QUICK: list[dict[str, Any]] = [
    *({"placement": name, "num_kv_heads": 2} for name in PLACEMENTS),
    *({"placement": name, "ffn": "moe", "moe": {"num_shared_experts": 1}} for name in PLACEMENTS),
    *({"placement": name, "placement_options": options} for name, each in OPTIONS.items() for options in each),
    *({"placement": "sandwich", **options} for options in DENSE),
    *({"placement": "subln", "ffn": "moe", "moe": options} for options in MIXTURES),
    *({"placement": name, "norm": OWN_NORM, "norm_eps": 0.1} for name in ("hybridnorm", "subln")),
    *({"placement": name, "qk_norm": kind} for name in ("hybridnorm", "outputnorm") for kind in ("head", "width")),
]
ALL_OPTIONS = [
    {},
    *(each for each in DENSE if "norm" not in each),
    *({"ffn": "moe", "moe": options} for options in MIXTURES),
]
LEFT_OUT = {
    # How the weights began: they are there.
    "init",
    "init_options",
    "init_truncation",
    # How it is run.
    "compile",
    "activation_checkpointing",
    "activation_checkpoint_every",
    "cpu_kernels",
    "backend",
    "expert_parallel",
    "bias_update_rate",  # the bias stays as it is
    "causal",  # a model that is not predicts no next token: test_image_parity.py
}


def label(options: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


def pair(**options: Any) -> tuple[Transformer, Any]:
    """The training's model and the exported one, of the same random weights under which a wrong norm would show."""
    ours = Transformer(tiny_config(**{"num_layers": LAYERS, **options}), VOCAB_SIZE, output_multiplier=0.7).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.15)
        for name, buffer in ours.named_buffers():
            if name.endswith("expert_bias"):
                buffer.normal_(std=0.3)
    theirs = PlacementForCausalLM(PlacementConfig(**remote_code.configuration(ours))).double()
    missing = theirs.load_state_dict(remote_code.weights(ours), strict=False)
    assert missing.unexpected_keys == []
    assert missing.missing_keys == (["model.head.weight"] if ours.config.tie_embeddings else [])
    return ours, theirs


def gradients(model: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def entropy(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    """What transformers' loss is but for its rounding to fp32."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def assert_parity(**options: Any) -> None:
    """Logits, the loss of training with all that belongs to it, and the gradient of every weight."""
    ours, theirs = pair(**options)
    theirs.loss_function = entropy
    batch, moe = tokens(2, 11), ours.config.moe
    close = {"atol": 1e-10, "rtol": 1e-10}
    with torch.no_grad():
        expected = ours.eval()(batch)[0]
        assert expected.std() > 1e-3
        torch.testing.assert_close(theirs.eval()(batch).logits, expected, **close)
    ours.train()
    theirs.train()
    torch.manual_seed(1)  # of the jitter
    logits, stats = ours(batch)
    loss = entropy(logits, batch)
    if stats:
        loss = loss + moe.balance_weight * torch.stack([layer.load_balancing_loss for layer in stats]).mean()
        loss = loss + moe.z_loss_weight * torch.stack([layer.z_loss for layer in stats]).mean()
    loss.backward()
    torch.manual_seed(1)
    same = theirs(batch, labels=batch).loss
    same.backward()
    torch.testing.assert_close(same, loss, **close)
    expected_gradients = gradients(ours, "model.")
    assert expected_gradients.keys() == gradients(theirs, "").keys()
    for name, gradient in gradients(theirs, "").items():
        scale = float(expected_gradients[name].abs().max())
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-9 * scale, rtol=1e-8, msg=name)


@pytest.mark.parametrize("options", QUICK, ids=label)
def test_the_exported_model_is_the_trained_one(options: dict[str, Any]) -> None:
    assert_parity(**options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("placement", "norm"), [(name, norm) for name, norm in product(PLACEMENTS, NORMS) if norm in PLACEMENTS[name].norms]
)
def test_every_combination_is_the_trained_one(placement: str, norm: str) -> None:
    for options, own in product(ALL_OPTIONS, [{}, *OPTIONS.get(placement, [])]):
        assert_parity(norm=norm, placement=placement, placement_options=own, **options)


def test_every_field_that_shapes_the_model_is_held_together() -> None:
    """A field that joins the configuration joins the export and these cases, or LEFT_OUT."""
    known = {field.name for schema in (ModelConfig, MoEConfig) for field in fields(schema)} - LEFT_OUT
    set_by_default = {"num_layers", "moe"}
    tried = {name for case in QUICK for name in (*case, *case.get("moe", {}))}
    assert known <= tried | set_by_default


@pytest.mark.parametrize("options", [{}, {"ffn": "moe"}, {"norm": "layernorm", "num_kv_heads": 1}], ids=label)
@torch.no_grad()
def test_in_bfloat16_too(options: dict[str, Any]) -> None:
    ours, theirs = pair(placement="hybridnorm", **options)
    batch = tokens(2, 11)
    exact, expected = ours.eval()(batch)[0], ours.bfloat16()(batch)[0]
    logits = theirs.eval().bfloat16()(batch).logits
    assert logits.dtype == torch.bfloat16
    error = (expected - exact).abs().mean()
    assert error > 0
    assert (logits - expected).abs().mean() < error, "nearer to the trained one than bf16 is to the truth"


@torch.no_grad()
def test_a_cast_leaves_the_selection_bias_exact() -> None:
    _, theirs = pair(placement="spannorm", ffn="moe", moe={"balancing": "bias"})
    router = theirs.model.blocks[0].ffn.router
    before = router.expert_bias.float()
    assert not torch.equal(before, before.bfloat16().float())
    assert torch.equal(theirs.bfloat16().model.blocks[0].ffn.router.expert_bias.float(), before)


def test_a_placement_whose_code_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"placement='midnorm' is not valid: expected one of .*: there is no code of"):
        PlacementForCausalLM(PlacementConfig(placement="midnorm", num_hidden_layers=1))


def test_an_unknown_score_is_refused() -> None:
    _, theirs = pair(placement="spannorm", ffn="moe")
    theirs.config.router_score = "softmin"
    with pytest.raises(ValueError, match="router_score='softmin' is not valid: expected softmax or sigmoid"):
        theirs(tokens(1, 3))
