"""The same language model as the project and its peers build it; each returns a loss to differentiate.

All have RMSNorm, rotary positions, SwiGLU of one width, no biases, no weight tying and torch's fused attention; OLMoE
norms queries and keys besides. The loss of a peer is cross-entropy alone: its router losses, which cost it much and
differ between projects, are left out, while ours are in. torchtitan is there twice: with the loss of all logits at
once, as the others have it, and with its own in chunks, which its configurations take. It has no mixture here: its
experts compute in bf16 whatever the model is in.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor], Tensor]
"""Tokens [batch, seq + 1] -> a scalar."""


class Sizes(NamedTuple):
    """The sizes of a model and its batch; num_experts 0 is a dense one."""

    vocab_size: int
    num_layers: int
    dim: int
    num_heads: int
    hidden: int
    seq_len: int
    batch_size: int
    num_experts: int = 0
    top_k: int = 2

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


def ours(sizes: Sizes, compiled: bool, all_logits: bool = False, **overrides: Any) -> tuple[nn.Module, Loss]:
    """Build ours: blocks compiled one by one, as model.compile=true does; router losses weighted as by default.

    Args:
        all_logits: whether the loss is made as that of a small vocabulary is.
        overrides: of the model's configuration.
    """
    from lightning_modules import language_module

    values: dict[str, Any] = {
        "num_layers": sizes.num_layers,
        "dim": sizes.dim,
        "num_heads": sizes.num_heads,
        "ffn_dim": sizes.hidden,
        "compile": compiled,
        "ffn": "moe" if sizes.num_experts else "dense",
        "moe": {"num_experts": max(sizes.num_experts, 2), "top_k": sizes.top_k},
        **overrides,
    }
    module = language_module.LanguageModule(values, {}, sizes.vocab_size)
    module.configure_model()
    moe = module.model_config.moe
    if all_logits:
        language_module.LARGE_VOCABULARY = sizes.vocab_size + 1

    def loss(tokens: Tensor) -> Tensor:
        total, stats = module.compute_loss({"tokens": tokens})
        if stats:
            balance = torch.stack([s.load_balancing_loss for s in stats]).mean()
            total = total + moe.balance_weight * balance
            total = total + moe.z_loss_weight * torch.stack([s.z_loss for s in stats]).mean()
        return total

    return module, loss


def litgpt(sizes: Sizes) -> nn.Module:
    from litgpt import GPT, Config

    return GPT(
        Config(
            block_size=sizes.seq_len,
            n_layer=sizes.num_layers,
            n_embd=sizes.dim,
            n_head=sizes.num_heads,
            vocab_size=sizes.vocab_size,
            padded_vocab_size=sizes.vocab_size,
            norm_class_name="RMSNorm",
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            mlp_class_name="LLaMAMoE" if sizes.num_experts else "LLaMAMLP",
            intermediate_size=sizes.hidden,
            moe_intermediate_size=sizes.hidden if sizes.num_experts else None,
            n_expert=sizes.num_experts,
            n_expert_per_token=sizes.top_k if sizes.num_experts else 0,
        )
    )


def _hugging_face(sizes: Sizes, name: str, **more: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.dim,
        intermediate_size=sizes.hidden,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_heads,
        max_position_embeddings=sizes.seq_len,
        tie_word_embeddings=False,
        use_cache=False,
        pad_token_id=None,
        **more,
    )
    config._attn_implementation = "sdpa"
    if sizes.num_experts:
        config._experts_implementation = "grouped_mm"
    return _Logits(getattr(transformers, f"{name}ForCausalLM")(config))


def llama(sizes: Sizes) -> nn.Module:
    return _hugging_face(sizes, "Llama")


def mixtral(sizes: Sizes) -> nn.Module:
    return _hugging_face(sizes, "Mixtral", num_local_experts=sizes.num_experts, num_experts_per_tok=sizes.top_k)


def olmoe(sizes: Sizes) -> nn.Module:
    return _hugging_face(sizes, "Olmoe", num_experts=sizes.num_experts, num_experts_per_tok=sizes.top_k)


def x_transformers(sizes: Sizes) -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(
        dim=sizes.dim,
        depth=sizes.num_layers,
        heads=sizes.num_heads,
        attn_dim_head=sizes.head_dim,
        attn_flash=True,
        rotary_pos_emb=True,
        rotary_emb_dim=sizes.head_dim,  # all of it as elsewhere, not half
        use_rmsnorm=True,
        ff_glu=True,
        ff_swish=True,
        ff_no_bias=True,
        ff_mult=sizes.hidden / sizes.dim,
    )
    wrapper: nn.Module = TransformerWrapper(
        num_tokens=sizes.vocab_size, max_seq_len=sizes.seq_len, attn_layers=layers, use_abs_pos_emb=False
    )
    return wrapper


def torchtitan(sizes: Sizes) -> nn.Module:
    from torchtitan.models import llama3
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention

    layers = llama3._build_llama3_layers(
        n_layers=sizes.num_layers,
        dim=sizes.dim,
        n_heads=sizes.num_heads,
        hidden_dim=sizes.hidden,
        rope=ComplexRoPE.Config(dim=sizes.head_dim, max_seq_len=sizes.seq_len),
        attn_backend="flex",
    )
    for layer in layers:  # the packed documents that flex serves are not what is measured
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    embedding, norm = llama3._EMBEDDING_INIT, llama3._NORM_INIT
    model: Any = llama3.Llama3Model.Config(
        dim=sizes.dim,
        vocab_size=sizes.vocab_size,
        tok_embeddings=Embedding.Config(num_embeddings=sizes.vocab_size, embedding_dim=sizes.dim, param_init=embedding),
        norm=RMSNorm.Config(normalized_shape=sizes.dim, param_init=norm),
        lm_head=Linear.Config(
            in_features=sizes.dim, out_features=sizes.vocab_size, param_init=llama3._output_linear_init(sizes.dim)
        ),
        layers=layers,
    ).build()
    model.init_states()
    built: nn.Module = model
    return built


class _Logits(nn.Module):
    """The logits of a Hugging Face model's output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits


CHUNKED = "torchtitan, loss in chunks"
PEERS: dict[str, Callable[[Sizes], nn.Module]] = {
    "litgpt": litgpt,
    "transformers Llama": llama,
    "x-transformers": x_transformers,
    "torchtitan Llama 3": torchtitan,
    CHUNKED: torchtitan,
    "litgpt MoE": litgpt,
    "transformers Mixtral": mixtral,
    "transformers OLMoE": olmoe,
}
DENSE = ("litgpt", "transformers Llama", "x-transformers", "torchtitan Llama 3", CHUNKED)
MIXTURES = ("litgpt MoE", "transformers Mixtral", "transformers OLMoE")


def peer(name: str, sizes: Sizes, compiled: bool) -> tuple[nn.Module, Loss]:
    """Return the peer of that name, compiled as a whole together with its loss, which is more than most of them do."""
    model = PEERS[name](sizes)
    if name == CHUNKED:
        return model, _in_chunks(model, sizes, compiled)

    def loss(tokens: Tensor) -> Tensor:
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    return model, torch.compile(loss) if compiled else loss


def _in_chunks(model: Any, sizes: Sizes, compiled: bool) -> Loss:
    """Compute torchtitan's own loss, set up as its trainer does; it leaves the head between the two uncompiled."""
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.config import CompileConfig

    inner = CrossEntropyLoss.Config(global_vocab_size=sizes.vocab_size)
    chunks = ChunkedLossWrapper.Config(loss_fn=inner).build(compile_config=CompileConfig(enable=compiled))
    chunks.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    decoder = torch.compile(model) if compiled else model
    count = torch.tensor(float(sizes.batch_size * sizes.seq_len))

    def loss(tokens: Tensor) -> Tensor:
        value: Tensor = chunks(decoder(tokens[:, :-1]), tokens[:, 1:], count)[0]
        return value

    return loss
