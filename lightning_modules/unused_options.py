"""Tells of options that were set and have no effect beside the others."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_modules.config import ModelConfig, MoEConfig, OptimConfig
from lightning_modules.width_scaling import KNOWN
from spannorm import PLACEMENTS, NormFactory
from spannorm.import_path import is_import_path
from spannorm.norms import POINTWISE

DIVIDING = ("attnres", "hc", "ihc", "mhc")
"""The placements that divide by a root mean square of their own, whatever the kind of the norms."""
HC_SCALE = inspect.signature(PLACEMENTS["hc"]).parameters["scale"].default

Unused = tuple[str, Any, str]
"""(name of the field, its value, why it has no effect)."""


def describe_unused(model: ModelConfig, optim: OptimConfig) -> list[str]:
    """Name each option that differs from its default but changes nothing in a run.

    A value that is the default counts as not set, as nothing tells the two apart here.

    Returns:
        One line for each of them.
    """
    found = [*_of_model(model), *_of_placement(model.placement, model.placement_options), *_of_optim(optim)]
    if model.ffn == "moe":
        found += _of_mixture(model.moe)
    else:
        given = [f"model.moe.{name}={value}" for name, value in vars(model.moe).items() if _is_set(model.moe, name)]
        if given:
            return [*_lines(found), f"{', '.join(given)} without effect: model.ffn={model.ffn} has no experts"]
    return _lines(found)


def _lines(found: list[Unused]) -> list[str]:
    return [f"{name}={value} has no effect: {reason}" for name, value, reason in found]


def _of_model(model: ModelConfig) -> Iterator[Unused]:
    if _is_set(model, "activation_checkpoint_every") and not model.activation_checkpointing:
        yield (
            "model.activation_checkpoint_every",
            model.activation_checkpoint_every,
            "model.activation_checkpointing is false",
        )
    kind, _ = NormFactory(model.norm, model.dim, options=model.norm_options).base
    static = model.placement == "hc" and model.placement_options.get("static", False)
    divides = (model.placement in DIVIDING and not static) or is_import_path(model.placement)
    if _is_set(model, "norm_eps") and kind in (*POINTWISE, "none") and not divides:
        yield "model.norm_eps", model.norm_eps, f"model.norm={kind} divides by nothing"
    if _is_set(model, "qk_norm") and model.norm == "none":
        yield "model.qk_norm", model.qk_norm, "model.norm=none is no norm here either"
    if model.qkv_bias and model.bias:
        yield "model.qkv_bias", True, "model.bias=true gives biases to these projections too"
    if model.ffn_dim is not None and model.ffn_dim not in model.hidden_dims:
        yield "model.ffn_dim", model.ffn_dim, "all FFNs are experts, whose widths model.moe sets"


def _of_placement(name: str, options: Mapping[str, Any]) -> Iterator[Unused]:
    if name == "hc" and options.get("static", False) and options.get("scale", HC_SCALE) != HC_SCALE:
        reason = "with model.placement_options.static=true there is nothing to scale"
        yield "model.placement_options.scale", options["scale"], reason


def _of_mixture(moe: MoEConfig) -> Iterator[Unused]:
    weight, rate = moe.load_balancing_weight, moe.bias_update_rate
    if _is_set(moe, "load_balancing_weight") and weight > 0 and moe.balancing != "loss":
        yield "model.moe.load_balancing_weight", weight, f"model.moe.balancing={moe.balancing} has no auxiliary loss"
    if _is_set(moe, "bias_update_rate") and rate > 0 and moe.balancing != "bias":
        yield "model.moe.bias_update_rate", rate, f"model.moe.balancing={moe.balancing} has no bias"
    if moe.top_k == moe.num_experts:
        reason = f"with model.moe.top_k=num_experts={moe.num_experts} every expert gets every token"
        if moe.balancing == "bias":
            yield "model.moe.balancing", moe.balancing, reason
        elif moe.balancing == "loss" and _is_set(moe, "load_balancing_weight") and weight > 0:
            yield "model.moe.load_balancing_weight", weight, reason
    if moe.jitter > 0 and moe.num_experts == 1 and moe.score == "softmax":
        yield "model.moe.jitter", moe.jitter, "the softmax of a single expert's logit is 1 whatever the router reads"


def _of_optim(optim: OptimConfig) -> Iterator[Unused]:
    if _is_set(optim, "eps") and optim.optimizer == "lion":
        yield "optim.eps", optim.eps, "optim.optimizer=lion divides by nothing"
    for name in ("betas", "eps"):
        if _is_set(optim, name) and optim.optimizer not in KNOWN:
            reason = f"optim.optimizer={optim.optimizer} gets its arguments by optim.optimizer_options"
            yield f"optim.{name}", getattr(optim, name), reason
    for name in ("decay_fraction", "decay_shape"):
        if _is_set(optim, name) and optim.schedule != "wsd":
            yield f"optim.{name}", getattr(optim, name), f"optim.schedule={optim.schedule} has no decay phase"
    if _is_set(optim, "min_lr_ratio") and optim.schedule == "constant":
        yield "optim.min_lr_ratio", optim.min_lr_ratio, "optim.schedule=constant does not decay"
    for name in ("min_lr_ratio", "decay_shape"):
        if _is_set(optim, name) and optim.schedule == "wsd" and optim.decay_fraction == 0:
            yield f"optim.{name}", getattr(optim, name), "with optim.decay_fraction=0 wsd does not decay"
    if _is_set(optim, "base_num_layers") and optim.depth_scaling == "none":
        yield "optim.base_num_layers", optim.base_num_layers, "optim.depth_scaling is none"
    for name in ("base_width", "base_ffn_width"):
        if _is_set(optim, name) and optim.width_scaling == "none":
            yield f"optim.{name}", getattr(optim, name), "optim.width_scaling is none"


def _is_set(config: ModelConfig | MoEConfig | OptimConfig, name: str) -> bool:
    value, default = getattr(config, name), getattr(type(config)(), name)
    if isinstance(default, tuple):  # a configuration has a list for it
        value = tuple(value)
    return bool(value != default)
