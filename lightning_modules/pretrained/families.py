"""The architectures of transformers that this project's model is, and how their config.json is read.

It may come from a stranger: nothing of it but numbers and names is used, and whatever would change what the model
computes is either one of `model`'s fields or refused by its name. Imports no torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import ConfigError, InvalidValue, suggest
from core.untrusted import MIB, Untrusted, read_json
from lightning_modules.config import MAX_LAYERS

CONFIG = "config.json"
OWN_CODE = "placement"
"""The model_type of what tools.export writes with its own code: its weights have this project's names."""
CONFIG_BYTES = MIB
SHOWN = 80
"""Characters of a value that a message repeats."""


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type, architecture: as its config.json names it, and its class in transformers.
        placement, qk_norm, qkv_bias: in this project's terms.
        norms: its names for the norms of attention and FFN, norm_attn and norm_ffn here.
        mixture: its name for a mixture of experts; None: all its FFNs are dense.
        experts: its names for an expert's gate, up and down projections.
        expert_dim: its field for the hidden width of an expert.
        dense_layers: whether decoder_sparse_step and mlp_only_layers may leave layers dense.
        normalizes: whether the weights of a token's experts are divided by their sum; None: norm_topk_prob says.
        defaults: what a missing field means, where that is not what it means in the others.
    """

    model_type: str
    architecture: str
    placement: str = "prenorm"
    qk_norm: str = "none"
    qkv_bias: bool = False
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    mixture: str | None = None
    experts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    expert_dim: str = "intermediate_size"
    dense_layers: bool = False
    normalizes: bool | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM"),
        Family("mistral", "MistralForCausalLM", defaults={"sliding_window": 4096, "num_key_value_heads": 8}),
        Family("qwen2", "Qwen2ForCausalLM", qkv_bias=True, defaults={"num_key_value_heads": 32}),
        Family(
            "qwen3", "Qwen3ForCausalLM", qk_norm="head", defaults={"num_key_value_heads": 32, "head_dim": 128}
        ),  # 2505.09388
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            placement="outputnorm",
            qk_norm="width",
            norms=("post_attention_layernorm", "post_feedforward_layernorm"),
            defaults={"rms_norm_eps": 1e-5},
        ),  # 2501.00656
        Family(
            "mixtral",
            "MixtralForCausalLM",
            mixture="block_sparse_moe",
            experts=("w1", "w3", "w2"),
            normalizes=True,
            defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8},
        ),  # 2401.04088
        Family(
            "olmoe", "OlmoeForCausalLM", qk_norm="width", mixture="mlp", defaults={"rms_norm_eps": 1e-5}
        ),  # 2409.02060
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            qk_norm="head",
            mixture="mlp",
            expert_dim="moe_intermediate_size",
            dense_layers=True,
            defaults={"num_key_value_heads": 4},
        ),
    )
}

DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}
"""What transformers takes for a field that a config.json lacks."""

FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "'silu': feed-forward layers are SwiGLUs"),
    "attention_bias": ((False, None), "false: of attention's projections only Qwen2's q, k and v have biases"),
    "mlp_bias": ((False, None), "false: feed-forward layers have no biases"),
    "attention_dropout": ((0,), "0: there is no dropout"),
    "sliding_window": ((None,), "null: attention reads all that comes before, and no window of it"),
    "use_sliding_window": ((False, None), "false: attention reads all that comes before, and no window of it"),
    "clip_qkv": ((None,), "null: queries, keys and values are not clipped"),
    "partial_rotary_factor": ((None, 1), "1: RoPE turns all of a head"),
    "rope_scaling": ((None,), "null: RoPE is not scaled"),
    "router_jitter_noise": ((0,), "0: noise in training is on the router's input alone here, not on the experts'"),
    "quantization_config": ((None,), "null: weights are fp32, fp16 or bf16"),
}
"""Fields that may have these values and no others, in words."""

WITHOUT_EFFECT = {
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "is_llama_config",  # of SmolLM
    "max_position_embeddings",
    "max_window_layers",
    "model_type",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",  # which cuts products, and adds up the same
    "tokenizer_class",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}
"""Fields that change nothing of what the model computes."""

READ = {
    "decoder_sparse_step",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "mlp_only_layers",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_local_experts",
    "rms_norm_eps",
    "rope_parameters",
    "rope_theta",
    "router_aux_loss_coef",
    "tie_word_embeddings",
    "vocab_size",
}
OF_DENSE_LAYERS = {"decoder_sparse_step", "mlp_only_layers"}
OF_MIXTURES = {
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "router_aux_loss_coef",
}


@dataclass(frozen=True)
class Pretrained:
    """A folder of transformers, by its config.json.

    Attributes:
        folder: where it lies.
        family: which architecture.
        model: what it says in the fields of `model`, as plain values.
        max_length: tokens in a sequence of its training; None: it does not say.
    """

    folder: Path
    family: Family
    model: dict[str, Any]
    max_length: int | None


def find_pretrained(folder: Path) -> Pretrained | None:
    """Return what a folder's config.json says; None: there is none, or what it describes has this project's names.

    Raises:
        ConfigError: it cannot be read, or describes what this project's model is not: names the field.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        content = read_json(path, limit=CONFIG_BYTES)
    except Untrusted as error:
        raise InvalidValue("init_from", str(folder), str(error)) from error
    if not isinstance(content, dict):
        raise InvalidValue("init_from", str(folder), f"{path} is no object of fields")
    if content.get("model_type") == OWN_CODE:
        return None
    return _Reader(path, content).pretrained()


class _Reader:
    """Reads the fields of one config.json."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content
        kind = content.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise self.wrong("model_type", suggest(str(kind)[:SHOWN], FAMILIES))
        self.family = FAMILIES[kind]

    def wrong(self, name: str, valid: str) -> ConfigError:
        value = self.content.get(name)
        short = len(repr(value)) <= SHOWN
        return ConfigError(f"{self.path}: {name}", value if short else f"{str(value)[:SHOWN]}…", valid)

    def get(self, name: str) -> Any:
        """Return a field's value, or what its absence means."""
        default = self.family.defaults.get(name, DEFAULTS.get(name))
        return self.content.get(name, default)

    def integer(self, name: str, optional: bool = False, most: int = 2**31) -> Any:
        value = self.get(name)
        if (optional and value is None) or (type(value) is int and 1 <= value <= most):
            return value
        raise self.wrong(name, f"an integer from 1 to {most:,}{' or null' if optional else ''}")

    def number(self, name: str, positive: bool = True) -> float:
        value = self.get(name)
        if type(value) not in (int, float) or not (0 < value < 1e30 or (value == 0 and not positive)):
            raise self.wrong(name, f"a number >{'' if positive else '='} 0")
        return float(value)

    def boolean(self, name: str) -> bool:
        value = self.get(name)
        if type(value) is not bool:
            raise self.wrong(name, "true or false")
        return value

    def pretrained(self) -> Pretrained:
        self.refuse_what_is_not_had()
        family = self.family
        dim, heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        head_dim = self.integer("head_dim", optional=True)
        if head_dim is None and dim % heads:
            raise self.wrong("num_attention_heads", f"a divisor of hidden_size={dim}, or head_dim beside it")
        model: dict[str, Any] = {
            "placement": family.placement,
            "placement_options": {},
            "norm": "rmsnorm",
            "norm_options": {},
            "norm_eps": self.number("rms_norm_eps"),
            "num_layers": self.integer("num_hidden_layers", most=MAX_LAYERS),
            "dim": dim,
            "num_heads": heads,
            "num_kv_heads": self.integer("num_key_value_heads", optional=True) or heads,
            "head_dim": None if head_dim is None or head_dim * heads == dim else head_dim,
            "qk_norm": family.qk_norm,
            "qkv_bias": family.qkv_bias,
            "rope_theta": self.rope_theta(),
            "ffn": "dense",
            "ffn_dim": self.integer("intermediate_size"),
            "tie_embeddings": self.boolean("tie_word_embeddings"),
            "vocab_size": self.integer("vocab_size"),
        }
        if family.mixture is not None and (mixtures := self.mixtures(model["num_layers"])):
            model |= {"ffn": "moe", "moe": self.moe(mixtures, model["num_layers"])}
            if len(mixtures) == model["num_layers"]:
                model["ffn_dim"] = None  # there is no dense layer
        length = self.content.get("max_position_embeddings")
        return Pretrained(self.path.parent, family, model, length if type(length) is int and length >= 1 else None)

    def refuse_what_is_not_had(self) -> None:
        architectures = self.content.get("architectures")
        if architectures is not None and architectures != [self.family.architecture]:
            raise self.wrong("architectures", f"['{self.family.architecture}']")
        windowed = self.family.model_type.startswith("qwen")  # where another field switches it on
        for name, (values, valid) in FIXED.items():
            if name == "rope_scaling":
                continue  # see rope_theta
            value = self.get(name) if name in (*DEFAULTS, *self.content) else values[0]
            if value not in values and not (name == "sliding_window" and windowed):
                raise self.wrong(name, valid)
        layers = self.content.get("layer_types")
        if layers is not None and (not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)):
            raise self.wrong("layer_types", "null, or 'full_attention' of each layer")
        known = WITHOUT_EFFECT | READ | FIXED.keys()
        if self.family.mixture is None:
            known -= OF_MIXTURES
        if not self.family.dense_layers:
            known -= OF_DENSE_LAYERS
        for name, value in self.content.items():
            # What is switched off has no effect under any name.
            if name not in known and not name.startswith("_") and value not in (None, False, [], {}):
                raise self.wrong(name, f"null, or no such field: {self.family.architecture} has none here")

    def rope_theta(self) -> float:
        """Return the base of the frequencies: transformers 4 writes it beside rope_scaling, 5 into rope_parameters."""
        for name in ("rope_scaling", "rope_parameters"):
            given = self.content.get(name)
            if given is None:
                continue
            valid = "null, or rope_type 'default' and rope_theta: RoPE is not scaled here"
            known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
            if not isinstance(given, dict) or given.keys() - known:
                raise self.wrong(name, valid)
            if given.get("partial_rotary_factor") not in FIXED["partial_rotary_factor"][0]:
                raise self.wrong(name, "null, or a partial_rotary_factor of 1: RoPE turns all of a head")
            if any(given.get(key, "default") != "default" for key in ("rope_type", "type")):
                raise self.wrong(name, valid)
            if (theta := given.get("rope_theta")) is not None:
                beside = self.content.get("rope_theta")
                if type(theta) not in (int, float) or not 0 < theta < 1e30 or beside not in (None, theta):
                    raise self.wrong(name, "a rope_theta > 0, the same as beside it")
                return float(theta)
        return self.number("rope_theta")

    def num_experts(self) -> int:
        name, other = ("num_experts", "num_local_experts")
        if name not in self.content:
            name = other  # of Mixtral, and of transformers 5
        elif other in self.content and self.content[other] != self.content[name]:
            raise self.wrong(other, f"num_experts={self.content[name]!r}, which is the same under another name"[:SHOWN])
        count: int = self.integer(name)
        return count

    def mixtures(self, num_layers: int) -> list[int]:
        """Return the numbers of the layers that are mixtures, counted from 1."""
        if not self.family.dense_layers:
            return list(range(1, num_layers + 1))
        step = self.integer("decoder_sparse_step") if "decoder_sparse_step" in self.content else 1
        dense = self.content.get("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(type(layer) is int and layer >= 0 for layer in dense):
            raise self.wrong("mlp_only_layers", "a list of layers, counted from 0, or null")
        left_out = {layer + 1 for layer in dense}
        return [layer for layer in range(step, num_layers + 1, step) if layer not in left_out]

    def moe(self, mixtures: list[int], num_layers: int) -> dict[str, Any]:
        top_k = self.integer("num_experts_per_tok")
        first, interval = self.pattern(mixtures, num_layers)
        normalizes = self.family.normalizes
        return {
            "num_experts": self.num_experts(),
            "top_k": top_k,
            "expert_dim": self.integer(self.family.expert_dim),
            "first_dense_layers": first,
            "layer_interval": interval,
            "score": "softmax",
            "normalize_weights": self.boolean("norm_topk_prob") if normalizes is None else normalizes,
            "load_balancing_weight": top_k * self.number("router_aux_loss_coef", positive=False),
        }

    def pattern(self, mixtures: list[int], num_layers: int) -> tuple[int, int]:
        """Return model.moe's first_dense_layers and layer_interval, which say which layers are mixtures."""
        first, *others = mixtures
        interval = others[0] - first if others else min(first, num_layers)
        dense = first - interval
        if dense < 0 or list(range(first, num_layers + 1, interval)) != mixtures:
            valid = "dense layers at the bottom alone, or mixtures at equal distances (model.moe.layer_interval)"
            raise self.wrong("mlp_only_layers", valid)
        return dense, interval


def fields_of(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield (name, value) of each field of `model`, those of `model.moe` as moe.NAME."""
    for name, value in values.items():
        if name == "moe" and isinstance(value, Mapping):
            yield from fields_of(value, "moe.")
        else:
            yield f"{prefix}{name}", value
