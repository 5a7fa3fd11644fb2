"""A language model with any normalization placement, for transformers: AutoModelForCausalLM, trust_remote_code=True.

Every argument that transformers passes is used, or refused by a ValueError that names it; none is ignored.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast
from transformers.utils import logging

from core.errors import require
from lightning_modules.config import ModelConfig, MoEConfig
from lightning_modules.layers.experts import ExpertMLP
from lightning_modules.transformer import Transformer

log = logging.get_logger(__name__)


class PlacementConfig(PretrainedConfig):
    """What the model is made of, and what transformers' own tools ask a configuration for.

    Args:
        model: fields of ModelConfig.
        output_multiplier: a constant factor on the logits.
        vocab_size: number of tokens.
        use_cache: whether generation keeps keys and values.
        max_position_embeddings: tokens in a sequence of the training.
        tie_word_embeddings: whether the head's weight is the embedding's; by default what `model` says.
        router_aux_loss_coef: weight of a mixture's load-balancing loss as transformers defines it, which is top_k times
            this project's.
        router_z_loss_coef: weight of a mixture's router z-loss.
        output_router_logits: whether forward returns the routers' logits.
        others: what every configuration has.
    """

    model_type = "placement"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - as transformers has it

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        output_multiplier: float = 1.0,
        vocab_size: int = 1,
        use_cache: bool = True,
        max_position_embeddings: int = 2048,
        tie_word_embeddings: bool | None = None,
        router_aux_loss_coef: float = 0.0,
        router_z_loss_coef: float = 0.0,
        output_router_logits: bool = False,
        **others: Any,
    ) -> None:
        self.model, self.output_multiplier, self.vocab_size = model or {}, output_multiplier, vocab_size
        parsed = self.parsed()
        tied = parsed.tie_embeddings if tie_word_embeddings is None else tie_word_embeddings
        super().__init__(**{**others, "tie_word_embeddings": tied})
        self.tie_word_embeddings = tied
        self.use_cache, self.max_position_embeddings = use_cache, max_position_embeddings
        self.router_aux_loss_coef, self.router_z_loss_coef = router_aux_loss_coef, router_z_loss_coef
        self.output_router_logits = output_router_logits
        self.hidden_size, self.num_hidden_layers = parsed.dim, parsed.num_layers
        self.num_attention_heads, self.num_key_value_heads = parsed.num_heads, parsed.kv_heads
        self.head_dim, self.intermediate_size = parsed.head_dim, parsed.hidden_dim

    def parsed(self) -> ModelConfig:
        """The fields of `model`, checked."""
        return ModelConfig(**{**self.model, "moe": MoEConfig(**self.model.get("moe", {}))})


class PlacementForCausalLM(PreTrainedModel, GenerationMixin):
    """The model that the run trained, with the names of its weights.

    Weights that a file lacks, and those of a model that is made from a configuration alone, are drawn as transformers
    draws them (normal, 0.02), not as the run's initialization did.
    """

    config_class = PlacementConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    accepts_loss_kwargs = True  # num_items_in_batch: Trainer leaves the division by accumulated batches to the loss
    _supports_sdpa = True  # and nothing else: attention is torch's scaled_dot_product_attention
    _no_split_modules = ["Block"]  # noqa: RUF012 - these three as transformers has them
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: PlacementConfig) -> None:
        super().__init__(config)
        parsed = replace(config.parsed(), tie_embeddings=config.tie_word_embeddings)
        if parsed.ffn == "moe" and parsed.moe.balancing == "bias":  # it selects by differences that bf16 has not
            self._keep_in_fp32_modules_strict = ["router"]
        self.model = Transformer(parsed, config.vocab_size, config.output_multiplier)
        for module in self.model.modules():  # constants come from the file, too: the model is built without values
            module._non_persistent_buffers_set.clear()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = new_embeddings

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ExpertMLP):
            for weight in (module.w1, module.v1, module.w2):
                if not getattr(weight, "_is_hf_initialized", False):
                    nn.init.normal_(weight, std=0.02)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        keywords = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and keywords.get("use_reentrant"):  # it would lose the gradients of a placement's second stream
            log.warning_once("use_reentrant=True is not supported: blocks are recomputed with use_reentrant=False")
            gradient_checkpointing_func = partial(gradient_checkpointing_func, use_reentrant=False)
        self.gradient_checkpointing = enable
        self.model.checkpoint = gradient_checkpointing_func
        self.model.config = replace(self.model.config, activation_checkpointing=enable, checkpoint_every=every_n_layers)

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
        """Next-token logits, and a loss where there are labels.

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
            output_hidden_states: the inputs of all blocks, and the last one's output, which is normed already.
            output_router_logits: of a mixture: its routers' logits, and the load-balancing loss.
            return_dict: false: a tuple.
            logits_to_keep: of the last so many positions, or of these; 0: of all.
            num_items_in_batch: what the loss is divided by, instead of by the number of this batch's labels.
            shift_labels: labels that are shifted already: at each position the token to predict.
            others: refused, unless they are None or false.

        Returns:
            loss, logits [batch, seq or fewer, vocab_size], past_key_values, hidden_states; of a mixture aux_loss and
            router_logits too. In training the loss of a mixture has its load-balancing and z-loss, as in the run.

        Raises:
            ValueError: an argument that this model cannot serve.
        """
        config = self.config
        output_hidden_states = _or_default(output_hidden_states, config.output_hidden_states)
        output_router_logits = _or_default(output_router_logits, config.output_router_logits)
        attentions = _or_default(output_attentions, config.output_attentions)
        require(not attentions, "output_attentions", True, "false: attention's weights never exist")
        grows = hasattr(past_key_values, "update") and not getattr(past_key_values, "is_compileable", False)
        kind = type(past_key_values).__name__
        require(past_key_values is None or grows, "past_key_values", kind, GROWING)
        require((input_ids is None) != (inputs_embeds is None), "inputs_embeds", "...", "either this or input_ids")
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        batch, seq = given.shape[:2]
        begins = f"at least one token: a text begins with bos_token_id={config.bos_token_id}"
        require(seq > 0, "input_ids", list(given.shape), begins)
        loss_wanted = labels is not None or shift_labels is not None
        whole = isinstance(logits_to_keep, int) and logits_to_keep == 0
        require(whole or not loss_wanted, "logits_to_keep", logits_to_keep, "0 where there are labels")

        recomputes = self.model.config.activation_checkpointing and torch.is_grad_enabled()
        if use_cache and recomputes:
            log.warning_once("use_cache=True does not go with gradient checkpointing: use_cache=False")
        use_cache = _or_default(use_cache, config.use_cache and not self.training) and not recomputes
        without = "none while blocks are recomputed: gradient_checkpointing_disable(), or torch.no_grad()"
        require(not recomputes or past_key_values is None, "past_key_values", kind, without)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        _check_others(others, past, seq)

        mixtures = list(self.model.mixtures().values())
        require(bool(mixtures) or not output_router_logits, "output_router_logits", True, "false: there are no routers")
        adds_auxiliary = bool(mixtures) and self.training and loss_wanted
        routers = [mixture.router.layer for mixture in mixtures] if output_router_logits or adds_auxiliary else []
        context = Context(attention_mask, position_ids, past_key_values, past, batch, seq, given.device)
        tokens = given if inputs_embeds is None else given.new_empty((batch, seq), dtype=torch.long)
        keep = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep > 0 else None
        where: dict[str, Any] = {} if context.is_plain else {"positions": context.positions, "cache": context}
        with (
            _recorded(self.model.blocks if output_hidden_states else [], inputs=True) as states,
            _recorded(self.model.blocks[-1:] if output_hidden_states else []) as last,
            _recorded(routers) as router_logits,
        ):
            logits, _ = self.model(tokens, **where, logits_to_keep=keep, embeddings=inputs_embeds)
        logits = logits[:, logits_to_keep] if isinstance(logits_to_keep, Tensor) else logits

        hidden_states = None
        if output_hidden_states:
            streams = f"false: between the blocks of {self.model.config.placement} there is more than one stream"
            require(all(isinstance(state, Tensor) for state in states), "output_hidden_states", True, streams)
            hidden_states = (*states, *last)
        loss, balance = None, None
        if loss_wanted:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=logits.size(-1),
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )
        if routers:
            balance, z_loss = self._auxiliary(router_logits, context.is_text())
            if adds_auxiliary:
                weighted = config.router_aux_loss_coef * balance + config.router_z_loss_coef * z_loss
                share = _share_of_labels(labels, shift_labels, num_items_in_batch)
                loss = loss + (weighted * share).to(logits.device)
        if mixtures:
            out: Any = MoeCausalLMOutputWithPast(
                loss=loss,
                aux_loss=balance,
                logits=logits,
                past_key_values=past_key_values,
                hidden_states=hidden_states,
                router_logits=tuple(router_logits) if output_router_logits else None,
            )
        else:
            out = CausalLMOutputWithPast(
                loss=loss, logits=logits, past_key_values=past_key_values, hidden_states=hidden_states
            )
        return out if _or_default(return_dict, config.return_dict) else out.to_tuple()

    def _auxiliary(self, router_logits: list[Tensor], is_text: Tensor | None) -> tuple[Tensor, Tensor]:
        """(load-balancing loss in transformers' measure, z-loss), means over the layers, of what is no padding."""
        device, top_k = router_logits[0].device, self.model.config.moe.top_k
        stats = []
        for mixture, logits in zip(self.model.mixtures().values(), router_logits, strict=True):
            text = logits if is_text is None else logits[is_text.flatten().to(logits.device)]
            stats.append(mixture.router.route(text)[2])
        balance = torch.stack([layer.load_balancing_loss.to(device) for layer in stats]).mean() * top_k
        return balance, torch.stack([layer.z_loss.to(device) for layer in stats]).mean()

    def generate(self, inputs: Tensor | None = None, *others: Any, **options: Any) -> Any:
        """transformers' generate; an empty prompt begins a text, as none does."""
        prompt = options.get("input_ids") if inputs is None else inputs
        if isinstance(prompt, Tensor) and prompt.dim() == 2 and prompt.size(1) == 0 and "inputs_embeds" not in options:
            begin = options.get("bos_token_id", self.generation_config.bos_token_id)
            require(begin is not None, "input_ids", list(prompt.shape), "at least one token: no token begins a text")
            inputs = torch.full((len(prompt), 1), begin, device=prompt.device)
            options = {name: value for name, value in options.items() if name not in ("input_ids", "attention_mask")}
        return super().generate(inputs, *others, **options)  # type: ignore[misc]  # it wants a protocol


GROWING = "a cache that grows with the text, as DynamicCache does (cache_implementation='dynamic')"


class Context:
    """Where the tokens at hand stand in their texts, and what they may look at; a KVCache to Transformer.

    Args:
        mask: forward's attention_mask.
        position_ids: forward's.
        cache: transformers', of what comes before; None: keys and values are not kept.
        past: number of tokens that it has.
        batch, seq: of the tokens at hand.
        device: where they are.

    Attributes:
        positions: [batch, seq].
        length: no position is larger than length - 1.
        is_plain: whether these are whole texts without padding, of which nothing is to be kept.
    """

    def __init__(
        self,
        mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        past: int,
        batch: int,
        seq: int,
        device: torch.device,
    ) -> None:
        self.cache, self.past, self.seq = cache, past, seq
        self.given = None if mask is None else mask.to(device)
        if mask is not None:
            fits = f"a tensor [batch, {past + seq}] or [batch, heads, {seq}, keys]: past and present tokens"
            shaped = mask.dim() == 4 or mask.shape == (batch, past + seq)
            require(shaped, "attention_mask", list(mask.shape), fits)
        self.padded = self.given is not None and (self.given.dim() == 4 or not bool(self.given.bool().all()))
        ordinary = torch.arange(past, past + seq, device=device).expand(batch, seq)
        self.length = past + seq
        if position_ids is not None:
            shaped = position_ids.dim() == 2 and position_ids.size(1) == seq and position_ids.size(0) in (1, batch)
            require(shaped, "position_ids", list(position_ids.shape), f"a tensor [{batch}, {seq}]")
            self.positions = position_ids.to(device).expand(batch, seq)
            require(bool((self.positions >= 0).all()), "position_ids", int(self.positions.min()), "numbers >= 0")
            self.length = int(self.positions.max()) + 1
        elif self.padded and self.given is not None and self.given.dim() == 2:
            self.positions = (self.given.bool().cumsum(1) - 1).clamp_min(0)[:, past:]
        else:
            self.positions = ordinary
        self.is_plain = cache is None and not self.padded and torch.equal(self.positions, ordinary)

    def at(self, positions: Tensor) -> Iterator["_Layer"]:
        """Each layer's part of the cache."""
        number = 0
        while True:
            yield _Layer(self, number)
            number += 1

    def mask(self, positions: Tensor) -> Tensor:
        """Who may look at whom: [batch, 1, seq, past + seq], or what forward was given for it."""
        given = self.given
        if given is not None and given.dim() == 4:
            return given
        keys = torch.arange(self.past + self.seq, device=positions.device)
        queries = keys[self.past :, None]
        allowed = (keys <= queries).expand(len(positions), 1, -1, -1)
        if given is not None:  # padding looks at itself, for a softmax over nothing is no number
            return (allowed & given.bool()[:, None, None]) | (keys == queries)
        if self.past == 0:
            starts = positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1
            texts = starts.cumsum(1)
            return allowed & (texts[:, None, :, None] == texts[:, None, None])
        return allowed

    def is_text(self) -> Tensor | None:
        """[batch, seq], whether a token at hand is no padding; None: all are none."""
        return self.given[:, self.past :].bool() if self.given is not None and self.given.dim() == 2 else None


class _Layer:
    """One layer of a transformers cache, as Attention keeps its keys and values."""

    def __init__(self, context: Context, number: int) -> None:
        self.context, self.number = context, number

    def put(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        cache, given = self.context.cache, self.context.given
        if cache is None:
            return keys, values
        keys, values = cache.update(keys, values, self.number)
        width = self.context.past + self.context.seq if given is None or given.dim() == 2 else given.size(-1)
        require(keys.size(2) == width, "past_key_values", type(cache).__name__, GROWING)
        return keys, values


@contextmanager
def _recorded(modules: Iterable[nn.Module], inputs: bool = False) -> Iterator[list[Any]]:
    """What these modules return while the context lasts, in order; or their first arguments."""
    found: list[Any] = []
    if inputs:
        hooks = [module.register_forward_pre_hook(lambda _, given: found.append(given[0])) for module in modules]
    else:
        hooks = [module.register_forward_hook(lambda _, given, out: found.append(_first(out))) for module in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


def _or_default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _share_of_labels(labels: Tensor | None, shift_labels: Tensor | None, whole: int | Tensor | None) -> float:
    """How much of all labels that a step of several batches has is in this one: its weight in their mean."""
    if whole is None:
        return 1.0
    if shift_labels is None:
        assert labels is not None
        shift_labels = labels[:, 1:]
    return float((shift_labels != -100).sum()) / float(whole)


def _check_others(others: dict[str, Any], past: int, seq: int) -> None:
    """Refuse arguments that forward does not have; cache_position, which says nothing new, has to be right."""
    place = others.pop("cache_position", None)
    expected = list(range(past, past + seq))
    if place is not None:
        require(place.tolist() == expected, "cache_position", place.tolist(), f"{expected}, which may be left out")
    for name, value in others.items():
        require(value is None or value is False, name, type(value).__name__, "nothing: this model has no such argument")
