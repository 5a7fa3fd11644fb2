"""A decoder-only language model that normalizes where a placement says.

A placement is the equation of one block around its attention and its feed-forward layer, and owns the block's norms;
it comes from the library spannorm. All else is as in Llama or Mixtral: rotary positions, grouped queries, SwiGLU,
optionally a mixture of experts. Every argument that transformers passes is used, or refused by a ValueError that names
it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast
from transformers.utils import logging

from spannorm import PLACEMENTS, Depth, InvalidArgument, NormFactory, Placement

log = logging.get_logger(__name__)

GROWING = "a cache that grows with the text, as DynamicCache does (cache_implementation='dynamic')"


class PlacementConfig(PretrainedConfig):
    """Says what the model is made of, under transformers' names where it has one.

    Args:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream.
        intermediate_size: hidden width of a dense feed-forward layer.
        num_hidden_layers: number of blocks.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key and value heads, which divides that of query heads; None takes the same.
        head_dim: width of one head; None takes hidden_size / num_attention_heads.
        qk_norm: norms on queries and keys before they are rotated, in the place of the placement's own: head, over each
            head, or width, over all of them together; none leaves what the placement has.
        qkv_bias: whether the projections to queries, keys and values have biases.
        bias: whether all projections of attention and of dense feed-forward layers have.
        causal: whether attention sees no later positions.
        hidden_act: silu, in a dense feed-forward layer of three matrices (SwiGLU), or gelu, in one of two.
        rope_theta: base of the rotary frequencies.
        max_position_embeddings: tokens in a sequence of the training; longer ones are not refused.
        placement: where a block normalizes, by the name in its code.
        placement_options: further arguments of the placement.
        norm: the kind of norm, by its name in the code.
        norm_options: further arguments of that kind.
        norm_eps: number added to the variance or the mean square.
        tie_word_embeddings: whether the head's weight is the embedding's.
        output_multiplier: a constant factor on the logits.
        num_experts: number of routed experts of a mixture; 0: all feed-forward layers are dense, and what follows here
            of mixtures has no effect.
        num_experts_per_tok: number of experts that a token goes to.
        moe_intermediate_size: hidden width of one routed expert; None takes intermediate_size.
        first_dense_layers: number of blocks at the bottom that are dense all the same.
        moe_layer_interval: of the blocks after those, each n-th is a mixture.
        num_shared_experts: number of further experts that every token goes to.
        shared_expert_intermediate_size: hidden width of one of these; None takes moe_intermediate_size.
        shared_expert_weighted_sum: whether shared and routed experts are added with weights 1 : num_experts_per_tok,
            of sum 1; otherwise their plain sum is taken.
        router_score: softmax or sigmoid, of the router's logits.
        router_bias: whether a bias takes part in the selection of experts, though not in their weights.
        norm_topk_prob: whether the weights of a token's experts are divided by their sum.
        router_jitter_noise: in training, the router's input is multiplied with noise from [1 - this, 1 + this].
        router_aux_loss_coef: weight of the load-balancing loss in training; 1 x num_experts_per_tok is its value at
            perfect balance, as for transformers' own mixtures.
        router_z_loss_coef: weight of the router z-loss in training.
        output_router_logits: whether forward returns the routers' logits.
        initializer_range: standard deviation of new weights. It is not what the training began with.
        use_cache: whether generation keeps keys and values.
        bos_token_id: the token that begins a text.
        eos_token_id: the token that ends a text.
        others: what every configuration has.
    """

    model_type = "placement"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 256,
        intermediate_size: int = 688,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: str = "none",
        qkv_bias: bool = False,
        bias: bool = False,
        causal: bool = True,
        hidden_act: str = "silu",
        rope_theta: float = 10000.0,
        max_position_embeddings: int = 2048,
        placement: str = "spannorm",
        placement_options: dict[str, Any] | None = None,
        norm: str = "rmsnorm",
        norm_options: dict[str, Any] | None = None,
        norm_eps: float = 1e-6,
        tie_word_embeddings: bool = False,
        output_multiplier: float = 1.0,
        num_experts: int = 0,
        num_experts_per_tok: int = 2,
        moe_intermediate_size: int | None = None,
        first_dense_layers: int = 0,
        moe_layer_interval: int = 1,
        num_shared_experts: int = 0,
        shared_expert_intermediate_size: int | None = None,
        shared_expert_weighted_sum: bool = False,
        router_score: str = "softmax",
        router_bias: bool = False,
        norm_topk_prob: bool = True,
        router_jitter_noise: float = 0.0,
        router_aux_loss_coef: float = 0.0,
        router_z_loss_coef: float = 0.0,
        output_router_logits: bool = False,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        **others: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.qk_norm = qk_norm
        self.qkv_bias = qkv_bias
        self.bias = bias
        self.causal = causal
        self.hidden_act = hidden_act
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings

        self.placement = placement
        self.placement_options = placement_options or {}
        self.norm = norm
        self.norm_options = norm_options or {}
        self.norm_eps = norm_eps
        self.output_multiplier = output_multiplier

        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = intermediate_size if moe_intermediate_size is None else moe_intermediate_size
        self.first_dense_layers = first_dense_layers
        self.moe_layer_interval = moe_layer_interval
        self.num_shared_experts = num_shared_experts
        self.shared_expert_intermediate_size = (
            self.moe_intermediate_size if shared_expert_intermediate_size is None else shared_expert_intermediate_size
        )
        self.shared_expert_weighted_sum = shared_expert_weighted_sum
        self.router_score = router_score
        self.router_bias = router_bias
        self.norm_topk_prob = norm_topk_prob
        self.router_jitter_noise = router_jitter_noise
        self.router_aux_loss_coef = router_aux_loss_coef
        self.router_z_loss_coef = router_z_loss_coef
        self.output_router_logits = output_router_logits

        self.initializer_range = initializer_range
        self.use_cache = use_cache
        general = {
            "tie_word_embeddings": tie_word_embeddings,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
        }
        super().__init__(**{**others, **general})
        self.tie_word_embeddings = tie_word_embeddings  # not every version of transformers sets it

    def is_mixture(self, layer: int) -> bool:
        """Return whether the block of this index, counted from 0, has a mixture of experts."""
        further = layer + 1 - self.first_dense_layers
        return self.num_experts > 0 and further > 0 and further % self.moe_layer_interval == 0


def require(condition: bool, name: str, value: object, valid: str) -> None:
    """Raise a ValueError that says what would be valid unless the condition holds."""
    if not condition:
        raise InvalidArgument(name, value, valid)


def norms_of(config: PlacementConfig, dim: int) -> NormFactory:
    """Return what makes this model's norms over `dim` features."""
    return NormFactory(config.norm, dim, config.norm_eps, config.norm_options, config.hidden_size)


def inner_norm(config: PlacementConfig, placement: Placement, dim: int) -> nn.Module:
    """Return the norm before a sublayer's output projection, which some placements ask for."""
    return norms_of(config, dim)() if placement.inner_norm else nn.Identity()


def rotary_embedding(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position x theta^(-2i / head_dim), fp32, [batch, 1, seq, head_dim] each."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[:, None, :, None].float() * theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) of x [batch, heads, seq, head_dim] by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Self-attention with grouped queries.

    The placement says whether queries, keys and values are normed, over each head or over all of them together, and
    whether one more norm stands before the output projection.
    """

    def __init__(self, config: PlacementConfig, placement: Placement, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        q_dim, kv_dim = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.is_grouped, self.causal = q_dim != kv_dim, config.causal
        qkv_bias = config.qkv_bias or config.bias
        self.q_proj = nn.Linear(config.hidden_size, q_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(q_dim, config.hidden_size, bias=config.bias)

        require(config.qk_norm in ("none", "head", "width"), "qk_norm", config.qk_norm, "none, head or width")
        declared = placement.qkv_norm
        self.norms_each_head = {} if declared is None else dict.fromkeys(declared.on, declared.per_head)
        if config.qk_norm != "none":
            self.norms_each_head.update(dict.fromkeys("qk", config.qk_norm == "head"))
        self.projection_norms = nn.ModuleDict()
        for name, dim in (("q", q_dim), ("k", kv_dim), ("v", kv_dim)):
            if name in self.norms_each_head:
                self.projection_norms[name] = norms_of(config, self.head_dim if self.norms_each_head[name] else dim)()
        self.inner_norm = inner_norm(config, placement, q_dim)

    def split_heads(self, name: str, projected: Tensor) -> Tensor:
        """Return x as [batch, heads, seq, head_dim], normed where the placement says so."""
        norm = self.projection_norms[name] if name in self.projection_norms else nn.Identity()
        each_head = self.norms_each_head.get(name, False)
        if not each_head:
            projected = norm(projected)
        heads = projected.unflatten(-1, (-1, self.head_dim))
        if each_head:
            heads = norm(heads)
        return heads.transpose(1, 2)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, attention_mask: Tensor | None, past_key_values: Any
    ) -> Tensor:
        """Return attention's output, [batch, seq, hidden_size] as x; without a mask, as the configuration says."""
        q, k = self.split_heads("q", self.q_proj(x)), self.split_heads("k", self.k_proj(x))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        v = self.split_heads("v", self.v_proj(x))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
            width = q.size(2) if attention_mask is None else attention_mask.size(-1)
            require(k.size(2) == width, "past_key_values", type(past_key_values).__name__, GROWING)
        is_causal = self.causal and attention_mask is None
        with kernels_with_a_gradient(q, attention_mask):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=attention_mask, is_causal=is_causal, enable_gqa=self.is_grouped
            )
        return self.o_proj(self.inner_norm(out.transpose(1, 2).flatten(2)))


def kernels_with_a_gradient(q: Tensor, attention_mask: Tensor | None) -> AbstractContextManager[Any]:
    """Leave cuDNN out where an explicit mask is trained with, as of padding: its gradient may be NaN.

    That is so at lengths of 64 mod 128 where the logits are far below 0 (pytorch/pytorch, issue 196678).
    """
    if attention_mask is None or not (q.is_cuda and torch.is_grad_enabled()):
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


class FeedForward(nn.Module):
    """SwiGLU, or GELU of one product, with one more norm before its output projection where the placement says so."""

    def __init__(self, config: PlacementConfig, placement: Placement, intermediate_size: int) -> None:
        super().__init__()
        require(config.hidden_act in ("silu", "gelu"), "hidden_act", config.hidden_act, "silu or gelu")
        self.is_gated = config.hidden_act == "silu"
        if self.is_gated:
            self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.bias)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.bias)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=config.bias)
        self.inner_norm = inner_norm(config, placement, intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up_proj(x)
        hidden = F.silu(self.gate_proj(x)) * hidden if self.is_gated else F.gelu(hidden)
        return self.down_proj(self.inner_norm(hidden))


class RouterLogits(nn.Linear):
    """A product in fp32 or wider, whatever x and the weight are stored in."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [tokens, num_experts] of x [tokens, hidden_size]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(dtype), self.weight.to(dtype))


class Router(nn.Module):
    """Chooses each token's experts and their weights, in fp32 under any precision."""

    expert_bias: Tensor | None

    def __init__(self, config: PlacementConfig) -> None:
        super().__init__()
        self.config = config
        self.layer = RouterLogits(config.hidden_size, config.num_experts, bias=False)
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.router_bias else None
        self.register_buffer("expert_bias", bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Keep the bias in fp32 whatever the model is cast to: it selects by differences that bf16 does not have."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias is not None and self.expert_bias.dtype != bias.dtype:
            self.expert_bias = bias.to(self.expert_bias.device)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (weights [tokens, k], experts [tokens, k], logits [tokens, num_experts]) of x."""
        noise = self.config.router_jitter_noise
        if self.training and noise > 0:
            x = x * torch.empty_like(x).uniform_(1 - noise, 1 + noise)
        with torch.autocast(x.device.type, enabled=False):
            logits = self.layer(x)
            scores = router_scores(logits, self.config)
            experts = select_experts(scores, self.expert_bias, self.config)
            weights = scores.gather(-1, experts)
            if self.config.norm_topk_prob:
                weights = share(weights)
            return weights, experts, logits


def router_scores(logits: Tensor, config: PlacementConfig) -> Tensor:
    """Return what selects and weighs the experts, [tokens, num_experts]."""
    require(config.router_score in ("softmax", "sigmoid"), "router_score", config.router_score, "softmax or sigmoid")
    return logits.softmax(dim=-1) if config.router_score == "softmax" else logits.sigmoid()


def select_experts(scores: Tensor, bias: Tensor | None, config: PlacementConfig) -> Tensor:
    """Return each token's experts, [tokens, num_experts_per_tok]."""
    biased = scores if bias is None else scores.detach() + bias
    return biased.topk(config.num_experts_per_tok, dim=-1).indices


def share(scores: Tensor) -> Tensor:
    """Divide by the sum over the last dimension, which is 0 where every expert scores 0."""
    return scores / scores.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


class Experts(nn.Module):
    """The routed experts, each a SwiGLU. They share the inner norm where the placement has one."""

    def __init__(self, config: PlacementConfig, placement: Placement) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        shape = (config.num_experts * config.moe_intermediate_size, config.hidden_size)
        # Each has the matrices of all experts, one below the other.
        self.w1 = nn.Parameter(torch.empty(shape))  # gate projections
        self.v1 = nn.Parameter(torch.empty(shape))  # up projections
        self.w2 = nn.Parameter(torch.empty(shape))  # down projections, transposed
        self.inner_norm = inner_norm(config, placement, config.moe_intermediate_size)

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Return the experts' outputs, summed by weights and experts [tokens, k]: [tokens, hidden_size] as x."""
        gates, ups, downs = (weight.chunk(self.num_experts) for weight in (self.w1, self.v1, self.w2))
        out = torch.zeros_like(x)
        for expert, (gate, up, down) in enumerate(zip(gates, ups, downs, strict=True)):
            token, place = torch.where(experts == expert)
            if len(token) == 0:
                continue
            rows = x[token]
            hidden = self.inner_norm(F.silu(F.linear(rows, gate)) * F.linear(rows, up))
            # Weighted in fp32, and only then rounded.
            weighted = F.linear(hidden, down.t()) * weights[token, place, None]
            out.index_add_(0, token, weighted.to(x.dtype))
        return out


class MixtureOfExperts(nn.Module):
    """Sends each token to some of the experts, and to all shared ones; no token is dropped."""

    def __init__(self, config: PlacementConfig, placement: Placement) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config)
        self.experts = nn.ModuleDict({"mlp": Experts(config, placement)})  # the weights have this name
        # n SwiGLUs side by side are one, n times as wide.
        width = config.num_shared_experts * config.shared_expert_intermediate_size
        self.shared_expert = FeedForward(config, placement, width) if width else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (output [batch, seq, hidden_size] as x, the router's logits [tokens, num_experts])."""
        tokens = x.flatten(0, -2)
        weights, experts, router_logits = self.router(tokens)
        out = self.experts["mlp"](tokens, weights, experts).view_as(x)
        if self.shared_expert is None:
            return out, router_logits
        shared = self.shared_expert(x)
        if self.config.shared_expert_weighted_sum:
            top_k = self.config.num_experts_per_tok
            return shared / (top_k + 1) + out * (top_k / (top_k + 1)), router_logits
        return shared + out, router_logits


class Block(GradientCheckpointingLayer):
    """One placement around one attention and one feed-forward layer."""

    def __init__(self, config: PlacementConfig, layer_idx: int) -> None:
        super().__init__()
        valid = f"one of {', '.join(PLACEMENTS)}: there is no code of another one here"
        require(config.placement in PLACEMENTS, "placement", config.placement, valid)
        norms = norms_of(config, config.hidden_size)
        depth = Depth(layer_idx + 1, config.num_hidden_layers)
        self.placement = PLACEMENTS[config.placement](depth, norms, **config.placement_options)
        self.attn = Attention(config, self.placement, layer_idx)
        self.is_mixture = config.is_mixture(layer_idx)
        self.ffn = (
            MixtureOfExperts(config, self.placement)
            if self.is_mixture
            else FeedForward(config, self.placement, config.intermediate_size)
        )
        self.embedding_scale = norms.embedding_scale() if depth.is_first else nn.Identity()

    def forward(
        self,
        state: Any,
        rope: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
    ) -> tuple[Any, Tensor | None]:
        """Return (the placement's state after the block, the router's logits of a mixture), of the state before it.

        The state is one tensor [batch, seq, hidden_size]; of a placement with several streams two of them, or one
        [batch, seq, streams, hidden_size]. The first block takes the embeddings, and the last one returns what the head
        reads.
        """
        router_logits: Tensor | None = None

        def attn(x: Tensor) -> Tensor:
            return self.attn(x, rope, attention_mask, past_key_values)

        def ffn(x: Tensor) -> Tensor:
            nonlocal router_logits
            if not self.is_mixture:
                return self.ffn(x)
            out, router_logits = self.ffn(x)
            return out

        if self.placement.depth.is_first:
            state = self.placement.enter(self.embedding_scale(state))
        state = self.placement(state, attn, ffn)
        if self.placement.depth.is_last:
            state = self.placement.leave(state)
        return state, router_logits


class PlacementModel(nn.Module):
    """Embedding, blocks and head; PlacementForCausalLM calls the head, which is here because of its weight's name."""

    def __init__(self, config: PlacementConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, embeds: Tensor, rope: tuple[Tensor, Tensor], attention_mask: Tensor | None, past_key_values: Any
    ) -> tuple[Tensor, list[Any], list[Tensor]]:
        """Return (what the head reads, the states between blocks, routers' logits) of [batch, seq, hidden_size].

        The states are those before each block, and what the head reads; there are logits of each mixture.
        """
        state: Any = embeds
        states, router_logits = [state], []
        for block in self.blocks:
            state, logits = block(state, rope, attention_mask, past_key_values=past_key_values)
            states.append(state)
            if logits is not None:
                router_logits.append(logits)
        return state, states, router_logits


class PlacementPreTrainedModel(PreTrainedModel):
    """Says how the weights of every model of these blocks are drawn, kept and recomputed."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # and nothing else: attention is torch's scaled_dot_product_attention
    _no_split_modules = ["Block"]

    def hold(self, model: nn.Module) -> None:
        """Take what is under the head, and let transformers finish."""
        if self.config.router_bias:
            self._keep_in_fp32_modules_strict = ["router"]
        self.model = model
        for module in model.modules():  # a placement's constants are read from the file, like weights
            module._non_persistent_buffers_set.clear()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts):
            for weight in (module.w1, module.v1, module.w2):
                if not getattr(weight, "_is_hf_initialized", False):
                    nn.init.normal_(weight, std=self.config.initializer_range)

    def _set_gradient_checkpointing(  # type: ignore[override]  # the options differ between versions
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **options: Any
    ) -> None:
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            # It would lose the gradients of a placement's second stream.
            log.warning_once("use_reentrant=True is not supported: blocks are recomputed with use_reentrant=False")
            gradient_checkpointing_func = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **options)


class PlacementForCausalLM(PlacementPreTrainedModel, GenerationMixin):
    """The language model with its loss, its cache and its generation.

    New weights, which a model has that is made from a configuration alone, are drawn as transformers draws them.
    """

    config: PlacementConfig
    config_class = PlacementConfig
    accepts_loss_kwargs = True  # num_items_in_batch: Trainer leaves the division by accumulated batches to the loss
    _skip_keys_device_placement = ["past_key_values"]
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}

    def __init__(self, config: PlacementConfig) -> None:
        super().__init__(config)
        require(config.causal, "causal", config.causal, "true: a model that sees later tokens cannot predict them")
        self.hold(PlacementModel(config))

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        shift_labels: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """Return next-token logits, and a loss where there are labels.

        Args:
            input_ids: [batch, seq].
            attention_mask: [batch, past + seq], 0 where there is padding, on any side; or what attention takes as it
                is, [batch, 1 or heads, seq, past + seq].
            position_ids: [batch or 1, seq]; by default counted from each text's first token. Without a mask and
                earlier tokens, a text begins wherever they do not go on by one (packed texts).
            past_key_values: a cache that grows with the text, as DynamicCache does.
            inputs_embeds: [batch, seq, hidden_size], instead of input_ids.
            labels: [batch, seq], as input_ids; -100 where nothing is to be predicted.
            use_cache: whether to return keys and values; by default what the configuration says, but not in training.
            output_attentions: refused; attention's weights never exist.
            output_hidden_states: the inputs of all blocks, and what the head reads.
            output_router_logits: of a mixture: its routers' logits, and the load-balancing loss.
            return_dict: false: a tuple.
            logits_to_keep: of the last so many positions, or of these; 0: of all.
            num_items_in_batch: what the loss is divided by, instead of by the number of this batch's labels.
            shift_labels: labels that are shifted already: at each position the token to predict.
            others: refused, unless they are None or false.

        Returns:
            loss, logits [batch, seq or fewer, vocab_size], past_key_values, hidden_states; of a mixture aux_loss and
            router_logits too. In training the loss of a mixture has its load-balancing and z-loss.

        Raises:
            ValueError: an argument that this model cannot serve.
        """
        config = self.config
        output_hidden_states = _or_default(output_hidden_states, config.output_hidden_states)
        output_router_logits = _or_default(output_router_logits, config.output_router_logits)
        has_mixtures = any(block.is_mixture for block in self.model.blocks)
        has_labels = labels is not None or shift_labels is not None
        attentions = _or_default(output_attentions, config.output_attentions)
        require(not attentions, "output_attentions", True, "false: attention's weights never exist")
        require(has_mixtures or not output_router_logits, "output_router_logits", True, "false: there are no routers")
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        require(keeps_all or not has_labels, "logits_to_keep", logits_to_keep, "0 where there are labels")

        require((input_ids is None) != (inputs_embeds is None), "inputs_embeds", "...", "either this or input_ids")
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        batch, seq = given.shape[:2]
        begins = f"at least one token: a text begins with bos_token_id={config.bos_token_id}"
        require(seq > 0, "input_ids", list(given.shape), begins)

        past_key_values = self._cache(past_key_values, use_cache)
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        _refuse_unknown(others, past, seq)
        attention_mask = None if attention_mask is None else attention_mask.to(given.device)
        _check_shapes(attention_mask, position_ids, past, batch, seq)
        if position_ids is not None:
            position_ids = position_ids.to(given.device).expand(batch, seq)
        visible = attention_mask_of(attention_mask, position_ids, past, seq, given.device)
        if position_ids is None:
            position_ids = positions_of(attention_mask, past, seq, given.device).expand(batch, seq)
        rope = rotary_embedding(position_ids, config.head_dim, config.rope_theta)

        embeds = self.model.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        hidden, states, router_logits = self.model(embeds, rope, visible, past_key_values)
        if output_hidden_states:
            streams = f"false: between the blocks of {config.placement} there is more than one stream"
            require(all(is_stream(state) for state in states), "output_hidden_states", True, streams)

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(hidden[:, kept] * config.output_multiplier)

        loss: Any = None
        if has_labels:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=logits.size(-1),
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )
        balance: Tensor | None = None
        adds_auxiliary = has_mixtures and has_labels and self.training
        if output_router_logits or adds_auxiliary:
            is_text = None
            if attention_mask is not None and attention_mask.dim() == 2:
                is_text = attention_mask[:, past:].bool()
            balance, z_loss = self._auxiliary_losses(router_logits, is_text)
            if adds_auxiliary:
                auxiliary = config.router_aux_loss_coef * balance + config.router_z_loss_coef * z_loss
                auxiliary = auxiliary * _share_of_labels(labels, shift_labels, num_items_in_batch)
                loss = loss + auxiliary.to(logits.device)
        output: Any = CausalLMOutputWithPast
        if has_mixtures:
            router_outputs = tuple(router_logits) if output_router_logits else None
            output = partial(MoeCausalLMOutputWithPast, aux_loss=balance, router_logits=router_outputs)
        out = output(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
        )
        return out if _or_default(return_dict, config.return_dict) else out.to_tuple()

    def _cache(self, past_key_values: Any, use_cache: bool | None) -> Any:
        """Return the cache to fill, or None."""
        kind = type(past_key_values).__name__
        grows = hasattr(past_key_values, "update") and not getattr(past_key_values, "is_compileable", False)
        require(past_key_values is None or grows, "past_key_values", kind, GROWING)
        recomputes = self.training and any(block.gradient_checkpointing for block in self.model.blocks)
        without = "none while blocks are recomputed: gradient_checkpointing_disable(), or eval()"
        require(not recomputes or past_key_values is None, "past_key_values", kind, without)
        if use_cache and recomputes:
            log.warning_once("use_cache=True does not go with gradient checkpointing: use_cache=False")
        wanted = _or_default(use_cache, self.config.use_cache and not self.training) and not recomputes
        return DynamicCache() if wanted and past_key_values is None else past_key_values

    def _auxiliary_losses(self, router_logits: list[Tensor], is_text: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (load-balancing loss, z-loss) of the tokens that are no padding, means over the layers.

        With T tokens of which count_e go to expert e, and p_te a token's scores divided by their sum, the first is
        num_experts / T sum_e count_e mean_t p_te; the second is mean_t logsumexp(logits_t)^2 (2202.08906, eq. 5).
        """
        balances, z_losses = [], []
        mixtures = [block.ffn for block in self.model.blocks if block.is_mixture]
        for mixture, logits in zip(mixtures, router_logits, strict=True):
            if is_text is not None:
                logits = logits[is_text.flatten().to(logits.device)]
            scores = router_scores(logits, self.config)
            bias = mixture.router.expert_bias
            experts = select_experts(scores, None if bias is None else bias.to(logits.device), self.config)
            counts = torch.bincount(experts.flatten(), minlength=self.config.num_experts)
            balance = self.config.num_experts / len(logits) * (counts * share(scores).mean(dim=0)).sum()
            balances.append(balance.to(router_logits[0].device))
            z_losses.append(logits.logsumexp(dim=-1).square().mean().to(router_logits[0].device))
        return torch.stack(balances).mean(), torch.stack(z_losses).mean()

    def generate(self, inputs: Tensor | None = None, *others: Any, **options: Any) -> Any:
        """Generate as every model of transformers does; an empty prompt begins a text, as none does."""
        prompt = options.get("input_ids") if inputs is None else inputs
        if isinstance(prompt, Tensor) and prompt.dim() == 2 and prompt.size(1) == 0 and "inputs_embeds" not in options:
            begin = options.get("bos_token_id", self.generation_config.bos_token_id)
            require(begin is not None, "input_ids", list(prompt.shape), "at least one token: no token begins a text")
            inputs = torch.full((len(prompt), 1), begin, device=prompt.device)
            options = {name: value for name, value in options.items() if name not in ("input_ids", "attention_mask")}
        return super().generate(inputs, *others, **options)  # type: ignore[misc]  # it wants a protocol


def positions_of(attention_mask: Tensor | None, past: int, seq: int, device: torch.device) -> Tensor:
    """Return where the tokens stand in their texts, [batch or 1, seq]; padding does not count."""
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.bool().cumsum(1) - 1).clamp_min(0)[:, past:]
    return torch.arange(past, past + seq, device=device)[None]


def attention_mask_of(
    attention_mask: Tensor | None, position_ids: Tensor | None, past: int, seq: int, device: torch.device
) -> Tensor | None:
    """Return who may look at whom, bool [batch or 1, 1, seq, past + seq]; None: causal attention of whole texts.

    A mask of four dimensions is returned as it was given to forward.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    keys = torch.arange(past + seq, device=device)
    queries = keys[past:, None]
    causal = (keys <= queries)[None, None]
    if attention_mask is not None and not bool(attention_mask.bool().all()):
        # Padding looks at itself, for a softmax over nothing is no number.
        return (causal & attention_mask.bool()[:, None, None]) | (keys == queries)
    if past > 0:
        return causal
    if attention_mask is None and position_ids is not None:
        text = (position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1).cumsum(1)
        if bool(text.any()):  # more than one
            return causal & (text[:, None, :, None] == text[:, None, None])
    return None


def is_stream(state: Any) -> bool:
    """Return whether the state between two blocks is a single stream, [batch, seq, hidden_size]."""
    return isinstance(state, Tensor) and state.dim() == 3


def _or_default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _check_shapes(attention_mask: Tensor | None, position_ids: Tensor | None, past: int, batch: int, seq: int) -> None:
    if attention_mask is not None:
        fits = attention_mask.dim() == 4 or attention_mask.shape == (batch, past + seq)
        valid = f"a tensor [batch, {past + seq}] or [batch, heads, {seq}, keys]: past and present tokens"
        require(fits, "attention_mask", list(attention_mask.shape), valid)
    if position_ids is not None:
        fits = position_ids.dim() == 2 and position_ids.size(1) == seq and position_ids.size(0) in (1, batch)
        require(fits, "position_ids", list(position_ids.shape), f"a tensor [{batch}, {seq}]")
        require(bool((position_ids >= 0).all()), "position_ids", int(position_ids.min()), "numbers >= 0")


def _refuse_unknown(others: dict[str, Any], past: int, seq: int) -> None:
    """Refuse arguments that forward does not have; cache_position, which says nothing new, has to be right."""
    place = others.pop("cache_position", None)
    expected = list(range(past, past + seq))
    if place is not None:
        require(place.tolist() == expected, "cache_position", place.tolist(), f"{expected}, which may be left out")
    for name, value in others.items():
        require(value is None or value is False, name, type(value).__name__, "nothing: this model has no such argument")


def _share_of_labels(labels: Tensor | None, shift_labels: Tensor | None, whole: int | Tensor | None) -> float:
    """Return how many of all labels that a step of several batches has are in this one: its weight in their mean."""
    if whole is None:
        return 1.0
    if shift_labels is None:
        assert labels is not None
        shift_labels = labels[:, 1:]
    return float((shift_labels != -100).sum()) / float(whole)
