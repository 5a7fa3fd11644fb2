"""Dropless token-choice mixture of SwiGLU experts, in MegaBlocks' parameter layout (2211.15841)."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.config import ModelConfig
from lightning_modules.layers.experts import BACKENDS, choose_backend
from lightning_modules.layers.matrices import Matrix
from lightning_modules.layers.norms import make_norm


class RouterStats(NamedTuple):
    """What one MoE layer reports beside its output; carried by return value, never by a global.

    Attributes:
        load_balancing_loss: scalar, E / (T k) sum_e count_e mean_t p_te; 1 at perfect balance (2101.03961, eq. 4).
        z_loss: scalar, mean_t logsumexp(logits_t)^2 (2202.08906, eq. 5).
        tokens_per_expert: [num_experts], how many of the T x k assignments each expert got.
    """

    load_balancing_loss: Tensor
    z_loss: Tensor
    tokens_per_expert: Tensor


class Router(nn.Module):
    """softmax over all experts in fp32, then the top k."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.moe = config.moe
        self.layer = nn.Linear(config.dim, config.moe.num_experts, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, RouterStats]:
        """x [tokens, dim] -> (weights [tokens, k] fp32, experts [tokens, k] int64, statistics)."""
        if self.training and self.moe.jitter > 0:
            x = x * torch.empty_like(x).uniform_(1 - self.moe.jitter, 1 + self.moe.jitter)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.layer.weight.float())
            scores = logits.softmax(dim=-1)
            weights, experts = scores.topk(self.moe.top_k, dim=-1)
            if self.moe.normalize_weights:
                weights = weights / weights.sum(dim=-1, keepdim=True)
            counts = torch.zeros_like(scores[0]).index_add(0, experts.flatten(), torch.ones_like(weights.flatten()))
            balance = self.moe.num_experts / experts.numel() * (counts * scores.mean(dim=0)).sum()
            z_loss = logits.logsumexp(dim=-1).square().mean()
        return weights, experts, RouterStats(balance, z_loss, counts)


class ExpertMLP(nn.Module):
    """Weights of all experts, stacked: w1 (gate), v1 (up) and w2 (down), each [num_experts x hidden, dim]."""

    def __init__(self, config: ModelConfig, inner_norm: bool) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim = config.moe.num_experts, config.expert_hidden_dim
        shape = (self.num_experts * self.hidden_dim, config.dim)
        self.w1 = nn.Parameter(torch.empty(shape))
        self.v1 = nn.Parameter(torch.empty(shape))
        self.w2 = nn.Parameter(torch.empty(shape))
        self.inner_norm = make_norm(config, self.hidden_dim) if inner_norm else nn.Identity()
        self.run = BACKENDS[choose_backend(config.moe.backend)]

    def forward(self, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """x [assignments, dim], sorted by expert -> [assignments, dim]."""
        w1, v1, w2 = (w.unflatten(0, (self.num_experts, -1)) for w in (self.w1, self.v1, self.w2))
        return self.run(x, w1, v1, w2, tokens_per_expert, self.inner_norm)


class Experts(nn.Module):
    """Sorts tokens by expert, runs the experts, and adds up each token's weighted outputs."""

    def __init__(self, config: ModelConfig, inner_norm: bool) -> None:
        super().__init__()
        self.top_k = config.moe.top_k
        self.mlp = ExpertMLP(config, inner_norm)

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """x [tokens, dim], weights and experts [tokens, k] -> [tokens, dim]; no token is ever dropped."""
        order = experts.flatten().argsort(stable=True)
        tokens = order // self.top_k
        out = self.mlp(x.index_select(0, tokens), tokens_per_expert)
        # Weighted in fp32 and only then cast: what MegaBlocks does, so that checkpoints may change backend.
        out = (out * weights.flatten().index_select(0, order).unsqueeze(-1)).to(x.dtype)
        return torch.zeros_like(x).index_add_(0, tokens, out)


class MoE(nn.Module):
    """Router and experts; a drop-in for FeedForward.

    Args:
        config: `model.moe`, dim, width of an expert and norm kind.
        inner_norm: one norm, shared by the experts, before their output projections (2210.06423).
    """

    def __init__(self, config: ModelConfig, inner_norm: bool = False) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config, inner_norm)

    def forward(self, x: Tensor) -> tuple[Tensor, RouterStats]:
        """x [batch, seq, dim] -> (output of the same shape, this layer's RouterStats)."""
        tokens = x.flatten(0, -2)
        weights, experts, stats = self.router(tokens)
        return self.experts(tokens, weights, experts, stats.tokens_per_expert).view_as(x), stats

    def matrices(self) -> Iterator[Matrix]:
        router, mlp = self.router.layer, self.experts.mlp
        dim, hidden = router.in_features, mlp.hidden_dim
        yield Matrix("router", router.weight, dim, router.out_features)
        yield Matrix("ffn_up", mlp.w1, dim, hidden)
        yield Matrix("ffn_up", mlp.v1, dim, hidden)
        yield Matrix("ffn_down", mlp.w2, hidden, dim)
