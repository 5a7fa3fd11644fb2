"""Grouped-query self-attention, causal or not, with rotary positions or none."""

import math
from collections.abc import Iterator

from torch import Tensor, nn

from lightning_modules.config import ModelConfig
from lightning_modules.layers.document_mask import Mask, attend
from lightning_modules.layers.ffn import linear
from lightning_modules.layers.kv_cache import Slots, filled_up
from lightning_modules.layers.norms import make_norm, norm_matrices
from lightning_modules.layers.rope import Rope, rotate
from spannorm import Matrix, QKVNorm


class Attention(nn.Module):
    """Projections around `scaled_dot_product_attention`; knows nothing of norms around it.

    Args:
        config: widths, number of heads, grouped-query attention (2305.13245), biases, norm kind, whether attention is
            causal, and `model.qk_norm`, whose norms on q and k take the place of those that a placement declares for
            these two.
        qkv_norm: norms on the projections that the placement declares, if any.
        inner_norm: one norm before the output projection (2210.06423).

    Attributes:
        norms_each_head: of each projection with a norm, whether it is over one head, or over all heads together.
    """

    def __init__(self, config: ModelConfig, qkv_norm: QKVNorm | None = None, inner_norm: bool = False) -> None:
        super().__init__()
        self.head_dim = config.head_width
        self.grouped, self.causal = config.kv_heads != config.num_heads, config.causal
        q_dim, kv_dim = config.attention_width, config.kv_heads * config.head_width
        qkv_bias = config.qkv_bias or config.bias
        self.q_proj = linear(config.dim, q_dim, qkv_bias)
        self.k_proj = linear(config.dim, kv_dim, qkv_bias)
        self.v_proj = linear(config.dim, kv_dim, qkv_bias)
        self.o_proj = linear(q_dim, config.dim, config.bias)

        self.norms_each_head = dict.fromkeys(qkv_norm.on, qkv_norm.per_head) if qkv_norm is not None else {}
        if config.qk_norm != "none":
            self.norms_each_head |= dict.fromkeys("qk", config.qk_norm == "head")
        widths = {"q": q_dim, "k": kv_dim, "v": kv_dim}
        self.projection_norms = nn.ModuleDict()
        for name, each_head in self.norms_each_head.items():
            self.projection_norms[name] = make_norm(config, config.head_width if each_head else widths[name])
        self.inner_norm = make_norm(config, q_dim) if inner_norm else nn.Identity()

    def forward(self, x: Tensor, rope: Rope | None, mask: Mask | None = None, slots: Slots | None = None) -> Tensor:
        """Return attention's output, [batch, seq, dim].

        Args:
            x: the tokens at hand.
            rope: of their positions; None: nothing is rotated.
            mask: which keys they may look at; None: all, or where attention is causal those up to their own.
            slots: where keys and values are kept; x then looks at all that is there.
        """
        q, k = self._queries_and_keys(x, rope)
        v = self._heads("v", self.v_proj(x))
        if slots is None:
            out = attend(q, k, v, mask, self.grouped, self.causal)
        else:
            k, v = slots.put(k, v)
            out = attend(filled_up(q), k, v, mask, self.grouped)[:, :, : q.size(2)]
        return self.o_proj(self.inner_norm(out.transpose(1, 2).flatten(2)))

    def logits(self, x: Tensor, rope: Rope | None) -> Tensor:
        """Return what forward's softmax takes, [batch, heads, seq, seq], queries by keys; -inf for what is not seen."""
        q, k = self._queries_and_keys(x, rope)
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
        products = (q @ k.mT).float() * self.head_dim**-0.5
        if not self.causal:
            return products
        return products.masked_fill(products.new_ones(products.shape[-2:]).triu(1).bool(), -math.inf)

    def _queries_and_keys(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor]:
        """Return queries and keys, [batch, heads or kv_heads, seq, head_dim], normed where declared, and
        rotated where positions are rotary."""
        q, k = (self._heads(name, projection(x)) for name, projection in (("q", self.q_proj), ("k", self.k_proj)))
        return (q, k) if rope is None else (rotate(q, rope), rotate(k, rope))

    def _heads(self, name: str, projected: Tensor) -> Tensor:
        """Return q, k or v [batch, seq, heads x head_dim] as [batch, heads, seq, head_dim], normed where declared."""
        each_head = self.norms_each_head.get(name)  # None: there is no norm
        if each_head is False:
            projected = self.projection_norms[name](projected)
        heads = projected.unflatten(-1, (-1, self.head_dim))
        if each_head:
            heads = self.projection_norms[name](heads)
        return heads.transpose(1, 2)

    def matrices(self) -> Iterator[Matrix]:
        yield Matrix("query", self.q_proj.weight, self.q_proj.in_features, self.q_proj.out_features)
        yield Matrix("key", self.k_proj.weight, self.k_proj.in_features, self.k_proj.out_features)
        yield Matrix("value", self.v_proj.weight, self.v_proj.in_features, self.v_proj.out_features)
        yield Matrix("attn_out", self.o_proj.weight, self.o_proj.in_features, self.o_proj.out_features)
        for name, norm in self.projection_norms.items():
            yield from norm_matrices(nn.ModuleList([norm]), width_is_explicit=self.norms_each_head[name])
        yield from norm_matrices(nn.ModuleList([self.inner_norm]))
