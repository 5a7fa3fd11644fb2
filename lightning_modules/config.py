"""Typed configuration of the model and its optimizer. Imports no torch, so `--help` stays fast.

Names (placement, norm, init, ffn, backend) are resolved where the thing is built, so that adding one touches a single
registry; here stand the numeric constraints.
"""

import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.errors import ConfigError, require, suggest
from core.explain import explain_omegaconf
from core.limits import require_at_most
from core.moved import with_current_names

CPU_KERNELS = ("auto", "off")
WIDTH_SCALINGS = ("none", "mup", "standard")
DEPTH_SCALINGS = ("none", "completep")
DECAY_SHAPES = ("linear", "exponential")
QK_NORMS = ("none", "head", "width")
MAX_LAYERS, MAX_DIM, MAX_HIDDEN_DIM, MAX_EXPERTS, MAX_VOCABULARY = 4096, 2**18, 2**21, 4096, 2**24 + 1
"""Far beyond what has been trained; at these, a model is still looked over within a minute (core/limits.py)."""

C = TypeVar("C", "ModelConfig", "OptimConfig")


@dataclass(frozen=True)
class MoEConfig:
    """A token-choice mixture of SwiGLU experts in place of the dense FFN (`model.ffn=moe`)."""

    num_experts: int = 8
    top_k: int = 2  # experts per token
    expert_dim: int | None = None  # hidden width of one expert; None: model.ffn_dim
    num_shared_experts: int = 0  # experts beside those, on every token (2401.06066)
    shared_expert_dim: int | None = None  # hidden width of one shared expert; None: that of a routed one
    shared_expert_weighted_sum: bool = False  # shared / (k + 1) + routed k / (k + 1); false: their plain sum
    first_dense_layers: int = 0  # that many layers keep the dense FFN (2401.06066)
    layer_interval: int = 1  # of the layers after those, each n-th is a mixture
    backend: str = "auto"  # auto, megablocks, grouped or loop: lightning_modules/layers/experts.py
    expert_parallel: int = 1  # processes that share out the experts of a layer
    score: str = "softmax"  # softmax or sigmoid, of the router's logits
    normalize_weights: bool | None = None  # divide the top-k weights by their sum; null: where top_k > 1
    jitter: float = 0.0  # training noise on the router's input: times U[1 - jitter, 1 + jitter]
    balancing: str = "loss"  # loss: auxiliary (2101.03961); bias: free of it (2408.15664); none
    load_balancing_weight: float = 0.01  # of the loss; transformers' is top_k times ours: take top_k x its coefficient
    bias_update_rate: float = 0.001  # of the bias, per optimizer step
    z_loss_weight: float = 0.001

    def __post_init__(self) -> None:
        for name, least in (
            ("num_experts", 1),
            ("num_shared_experts", 0),
            ("first_dense_layers", 0),
            ("layer_interval", 1),
        ):
            require(getattr(self, name) >= least, f"model.moe.{name}", getattr(self, name), f"an integer >= {least}")
        for name, most in (("num_experts", MAX_EXPERTS), ("num_shared_experts", MAX_EXPERTS)):
            require_at_most(most, f"model.moe.{name}", getattr(self, name))
        for name in ("expert_dim", "shared_expert_dim"):
            require_at_most(MAX_HIDDEN_DIM, f"model.moe.{name}", getattr(self, name))
        require(
            1 <= self.top_k <= self.num_experts,
            "model.moe.top_k",
            self.top_k,
            f"an integer from 1 to model.moe.num_experts={self.num_experts}",
        )
        for name in ("expert_dim", "shared_expert_dim"):
            width = getattr(self, name)
            require(width is None or width >= 1, f"model.moe.{name}", width, "an integer >= 1 or null")
        for name, unset in (("shared_expert_dim", "null"), ("shared_expert_weighted_sum", "false")):
            valid = f"{unset}, or model.moe.num_shared_experts >= 1: there is no shared expert"
            used = self.num_shared_experts > 0 or not getattr(self, name)
            require(used, f"model.moe.{name}", getattr(self, name), valid)
        require(
            self.expert_parallel >= 1 and self.num_experts % self.expert_parallel == 0,
            "model.moe.expert_parallel",
            self.expert_parallel,
            f"a divisor of model.moe.num_experts={self.num_experts}",
        )
        require(0 <= self.jitter < 1, "model.moe.jitter", self.jitter, "a number in [0, 1)")
        for name in ("load_balancing_weight", "bias_update_rate", "z_loss_weight"):
            require(0 <= getattr(self, name) < math.inf, f"model.moe.{name}", getattr(self, name), "a number >= 0")

    @property
    def normalizes_weights(self) -> bool:
        """Return whether a token's weights are divided by their sum; a single one is not, as it would be constant."""
        return self.top_k > 1 if self.normalize_weights is None else self.normalize_weights

    @property
    def balance_weight(self) -> float:
        """Return what the load-balancing loss is multiplied by."""
        return self.load_balancing_weight if self.balancing == "loss" else 0.0

    def is_mixture(self, layer: int) -> bool:
        """Return whether the layer of this number, counted from 1, is one of `model.ffn=moe`'s mixtures."""
        return layer > self.first_dense_layers and (layer - self.first_dense_layers) % self.layer_interval == 0


@dataclass(frozen=True)
class ModelConfig:
    """A transformer. Every field can be overridden as `model.FIELD=VALUE`."""

    placement: str = "spannorm"  # where the block normalizes: spannorm/placements, or the import path of a class
    placement_options: dict[str, Any] = field(default_factory=dict)  # arguments of that placement
    init: str = "default"  # spannorm/initialization.py, or an import path; default: what the placement names
    init_options: dict[str, Any] = field(default_factory=dict)  # arguments of that init
    init_truncation: float | None = None  # redraw what is beyond so many standard deviations (OLMo: 3); null: nothing
    norm: str = "rmsnorm"  # spannorm/norms.py, or an import path
    norm_options: dict[str, Any] = field(default_factory=dict)  # arguments of that kind of norm
    norm_eps: float = 1e-6
    num_layers: int = 8
    dim: int = 256
    num_heads: int = 4
    num_kv_heads: int | None = None  # None: num_heads; fewer: grouped-query attention
    head_dim: int | None = None  # width of one head; None: dim / num_heads
    qk_norm: str = "none"  # norms on q and k before RoPE: head, width (all heads together); none: the placement's own
    qkv_bias: bool = False  # biases on the q, k and v projections, which start at 0
    bias: bool = False  # biases on all projections of attention and dense FFN, which start at 0
    causal: bool = True  # attention sees no later positions; false: all, as masked training and images want it
    rope_theta: float = 10000.0
    ffn: str = "dense"  # dense (SwiGLU), mlp (GELU, two matrices) or moe
    ffn_dim: int | None = None  # hidden width; None: 8/3 dim, rounded up to a multiple of 16; of mlp 4 dim
    tie_embeddings: bool = False
    vocab_size: int | None = None  # rows of embedding and head; None: the data's vocabulary, which may have fewer
    compile: bool = False  # torch.compile each block
    cpu_kernels: str = (
        "auto"  # auto: faster ways on a CPU, lightning_modules/layers/cpu_kernels; off: torch's own alone
    )
    activation_checkpointing: bool = False  # recompute blocks in the backward pass instead of storing them
    activation_checkpoint_every: int = 1  # of the blocks, each n-th: less is recomputed, and less is saved
    moe: MoEConfig = field(default_factory=MoEConfig)

    def __post_init__(self) -> None:
        for name in ("num_layers", "dim", "num_heads", "activation_checkpoint_every"):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "an integer >= 1")
        for name, most in (
            ("num_layers", MAX_LAYERS),
            ("dim", MAX_DIM),
            ("num_heads", MAX_DIM),
            ("head_dim", MAX_DIM),
            ("ffn_dim", MAX_HIDDEN_DIM),
            ("vocab_size", MAX_VOCABULARY),
        ):
            require_at_most(most, f"model.{name}", getattr(self, name))
        for name in ("ffn_dim", "vocab_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"model.{name}", value, "an integer >= 1 or null")
        cut = self.init_truncation
        require(cut is None or 0 < cut < math.inf, "model.init_truncation", cut, "a number > 0 or null")
        for name in ("norm_eps", "rope_theta"):
            require(0 < getattr(self, name) < math.inf, f"model.{name}", getattr(self, name), "a number > 0")
        if self.cpu_kernels == "False":  # what YAML makes of off without quotes
            object.__setattr__(self, "cpu_kernels", "off")
        if self.cpu_kernels not in CPU_KERNELS:
            raise ConfigError("model.cpu_kernels", self.cpu_kernels, suggest(self.cpu_kernels, CPU_KERNELS))
        if self.qk_norm not in QK_NORMS:
            raise ConfigError("model.qk_norm", self.qk_norm, suggest(self.qk_norm, QK_NORMS))
        biased = self.bias and self.ffn == "moe"
        require(not biased, "model.bias", self.bias, "false with model.ffn=moe: experts have no biases")
        even = self.head_dim is None or (self.head_dim >= 2 and self.head_dim % 2 == 0)
        require(even, "model.head_dim", self.head_dim, "an even integer >= 2 (RoPE turns pairs), or null")
        require_at_most(MAX_HIDDEN_DIM // self.num_heads, "model.head_dim", self.head_dim)
        require(
            self.head_dim is not None or self.dim % (2 * self.num_heads) == 0,
            "model.dim",
            self.dim,
            f"a multiple of 2 x model.num_heads={self.num_heads} (heads of equal, even width: RoPE turns pairs), "
            "or any with model.head_dim",
        )
        require(
            self.num_kv_heads is None or (self.num_kv_heads >= 1 and self.num_heads % self.num_kv_heads == 0),
            "model.num_kv_heads",
            self.num_kv_heads,
            f"a divisor of model.num_heads={self.num_heads}, or null",
        )

    @property
    def head_width(self) -> int:
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def attention_width(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_width

    @property
    def hidden_dim(self) -> int:
        """Width of the dense FFN. 8/3 dim makes three SwiGLU matrices as large as two of 4 dim (2002.05202)."""
        if self.ffn == "mlp" and self.ffn_dim is None:
            return 4 * self.dim
        return self.ffn_dim if self.ffn_dim is not None else -(-8 * self.dim // 48) * 16

    @property
    def expert_hidden_dim(self) -> int:
        return self.moe.expert_dim if self.moe.expert_dim is not None else self.hidden_dim

    @property
    def shared_expert_hidden_dim(self) -> int:
        """Width of one shared expert."""
        return self.moe.shared_expert_dim if self.moe.shared_expert_dim is not None else self.expert_hidden_dim

    @property
    def hidden_dims(self) -> set[int]:
        """The hidden widths that its dense FFNs, routed and shared experts have."""
        if self.ffn != "moe":
            return {self.hidden_dim}
        dims = {self.expert_hidden_dim}
        if self.moe.num_shared_experts:
            dims.add(self.shared_expert_hidden_dim)
        if not all(self.moe.is_mixture(layer) for layer in range(1, self.num_layers + 1)):
            dims.add(self.hidden_dim)
        return dims


@dataclass(frozen=True)
class OptimConfig:
    """An optimizer with linear warm-up, then cosine decay or warm-up-stable-decay (2404.06395)."""

    optimizer: str = "adamw"  # adamw, muon or lion: lightning_modules/optimizers.py; or the import path of a class
    optimizer_options: dict[str, Any] = field(default_factory=dict)  # arguments of that optimizer
    groups: dict[str, Any] = field(default_factory=dict)  # by role: {embedding: {lr_factor: 0.3, weight_decay: 0.0}}
    lr: float = 3e-3  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.95)  # of adamw, of lion, and of the part of muon that is adamw's
    eps: float = 1e-8  # likewise, but for lion, which has none
    weight_decay: float = 0.1  # not on norms, biases and embeddings, unless optim.groups says so
    schedule: str = "cosine"  # cosine, wsd or constant, or the import path of a function
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1  # where the schedule ends, as a fraction of lr
    decay_fraction: float = 0.2  # wsd: the last part of the run that decays
    decay_shape: str = "linear"  # wsd: linear, or exponential as in 2404.06395
    width_scaling: str = "none"  # none, mup or standard: lightning_modules/width_scaling.py
    base_width: int = 128  # the model.dim at which lr and init were tuned
    base_ffn_width: int | None = None  # the hidden width there; None: lightning_modules/width_scaling.py
    depth_scaling: str = "none"  # none or completep: lightning_modules/depth_scaling.py
    base_num_layers: int = 2  # the model.num_layers at which lr and eps were tuned

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "warmup_steps"):
            require(0 <= getattr(self, name) < math.inf, f"optim.{name}", getattr(self, name), "a number >= 0")
        require(0 < self.eps < math.inf, "optim.eps", self.eps, "a number > 0")
        valid_betas = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(valid_betas, "optim.betas", self.betas, "two numbers in [0, 1)")
        if self.width_scaling not in WIDTH_SCALINGS:
            raise ConfigError("optim.width_scaling", self.width_scaling, suggest(self.width_scaling, WIDTH_SCALINGS))
        if self.depth_scaling not in DEPTH_SCALINGS:
            raise ConfigError("optim.depth_scaling", self.depth_scaling, suggest(self.depth_scaling, DEPTH_SCALINGS))
        if self.decay_shape not in DECAY_SHAPES:
            raise ConfigError("optim.decay_shape", self.decay_shape, suggest(self.decay_shape, DECAY_SHAPES))
        require(self.base_width >= 1, "optim.base_width", self.base_width, "an integer >= 1")
        require(self.base_num_layers >= 1, "optim.base_num_layers", self.base_num_layers, "an integer >= 1")
        require(
            self.base_ffn_width is None or self.base_ffn_width >= 1,
            "optim.base_ffn_width",
            self.base_ffn_width,
            "an integer >= 1 or null",
        )
        for name in ("min_lr_ratio", "decay_fraction"):
            require(0 <= getattr(self, name) <= 1, f"optim.{name}", getattr(self, name), "a number in [0, 1]")
        reachable = self.decay_shape == "linear" or self.min_lr_ratio > 0
        valid = "a number > 0 with optim.decay_shape=exponential, which never comes to 0"
        require(reachable, "optim.min_lr_ratio", self.min_lr_ratio, valid)


def writable_schema(schema: type) -> DictConfig:
    """Return the dataclass as a typed OmegaConf node that takes overrides: OmegaConf makes frozen ones read-only."""
    node = OmegaConf.structured(schema)
    assert isinstance(node, DictConfig)
    for child in (node, *(value for value in node.values() if isinstance(value, DictConfig))):
        OmegaConf.set_readonly(child, False)
    return node


def parse(schema: type[C], prefix: str, values: dict[str, Any]) -> C:
    """Return `schema` filled with plain values, type-checked.

    Args:
        schema: ModelConfig or OptimConfig.
        prefix: what the user calls this group (`model`, `optim`), for the messages.
        values: plain containers, as a checkpoint or Hydra's `_convert_=all` gives them.

    Raises:
        ConfigError: an unknown field, a wrong type, or a value outside its range.
    """
    values = with_current_names(values, prefix)
    if schema is ModelConfig:
        values = _with_former_defaults(values)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(writable_schema(schema), values))
    except OmegaConfBaseException as error:
        raise explain_omegaconf(error, prefix, _value_at(values, error.full_key or "")) from error
    assert isinstance(config, schema)
    return config


def settings(config: ModelConfig | OptimConfig, prefix: str) -> dict[str, Any]:
    """Return every field by its dotted name, with the value that takes effect; a scheme's options are one value."""
    by_name: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, MoEConfig):
            effective = {**vars(value), "normalize_weights": value.normalizes_weights}
            by_name.update((f"{prefix}.{name}.{field}", inner) for field, inner in effective.items())
        else:
            by_name[f"{prefix}.{name}"] = value
    return by_name


def _with_former_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Return a saved configuration that is older than a field, with that field as it then was.

    A run saves every field. One that says nothing of the norm's options was trained before dyt had any.
    """
    saved = {"norm", "norm_eps", "rope_theta", "tie_embeddings", "moe"} <= values.keys()
    if saved and values["norm"] == "dyt" and "norm_options" not in values:
        return {**values, "norm_options": {"alpha": 0.5, "alpha_attention": 0.5, "embedding_scale": None}}
    return values


def _value_at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
