"""The router says which experts a token goes to, with what weights, and reports on its choices."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from core.compat import all_reduce, wait_tensor
from core.errors import ConfigError, lookup, suggest
from lightning_modules.config import ModelConfig


class RouterStats(NamedTuple):
    """Carries what one MoE layer reports beside its output; by return value, never by a global.

    p_te: token t's scores over the experts e, divided by their sum. T tokens; k experts a token, of E. Only the two
    losses carry a gradient. All are of this process' tokens, but for the counts in load_balancing_loss.

    Attributes:
        tokens_per_expert: [num_experts], how many of the T k assignments each expert got.
        load_balancing_loss: scalar, E / (T k) sum_e count_e mean_t p_te; 1 at perfect balance (2101.03961, eq. 4). In
            training the counts are the mean over all processes', so that the mean of their losses is that of one
            process with all tokens. transformers does not divide by k: its loss is k times this one.
        z_loss: scalar, mean_t logsumexp(logits_t)^2 (2202.08906, eq. 5).
        entropy: scalar, mean_t of p_t's entropy in nats; ln E where the router is undecided.
        top1_margin: scalar, mean_t of the largest p_te minus the second largest.
        logits_norm: scalar, mean_t of the logits' l2 norm.
    """

    tokens_per_expert: Tensor
    load_balancing_loss: Tensor
    z_loss: Tensor
    entropy: Tensor
    top1_margin: Tensor
    logits_norm: Tensor


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(dim=-1)
    return scores, scores


def _sigmoid(logits: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid()
    return scores, _share(scores)


def _share(scores: Tensor) -> Tensor:
    """Return scores divided by their sum over the last dimension; where all of a token's are 0, they stay 0."""
    return scores / scores.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


SCORES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "softmax": _softmax,
    "sigmoid": _sigmoid,  # 2408.15664, 2412.19437: no competition between experts
}
"""Logits [tokens, experts] -> (scores, which select and weigh; the same with sum 1 over the experts)."""

BALANCINGS = ("loss", "bias", "none")


def _mean_over_processes(counts: Tensor) -> Tensor:
    """Return counts' mean over all processes, by a collective that torch.compile traces; it has no gradient."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return counts
    everyone = dist.group.WORLD
    assert everyone is not None
    return wait_tensor(all_reduce(counts, "sum", everyone)) / everyone.size()


class RouterLogits(nn.Linear):
    """x W^T in fp32 or wider, whatever x and the weight are stored in."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [tokens, num_experts] of x [tokens, dim]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(dtype), self.weight.to(dtype))


class Router(nn.Module):
    """Scores over all experts, of which the top k are taken; in fp32 under any precision.

    The weights of several experts are divided by their sum, unless `normalize_weights` is false. That of a single one
    (top_k=1) is its score: divided by itself it would be the constant 1, and the loss would not reach the router. With
    one expert in all (num_experts=1) a softmax is that constant; the router is then frozen, as there is nothing to
    choose. With top_k = num_experts all experts get all tokens, and no kind of balancing has anything to do.

    Args:
        config: dim and `model.moe`.

    Raises:
        ConfigError: a kind of score or of balancing that does not exist.
    """

    expert_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.moe = config.moe
        self.score = lookup("model.moe.score", config.moe.score, SCORES)
        if config.moe.balancing not in BALANCINGS:
            valid = suggest(config.moe.balancing, BALANCINGS)
            raise ConfigError("model.moe.balancing", config.moe.balancing, valid)
        self.layer = RouterLogits(config.dim, config.moe.num_experts, bias=False)
        bias = torch.zeros(config.moe.num_experts, dtype=torch.float32) if config.moe.balancing == "bias" else None
        self.register_buffer("expert_bias", bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Cast and move all but the bias, which stays in fp32: in bf16 its small updates come to nothing."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias is not None and self.expert_bias.dtype != bias.dtype:
            self.expert_bias = bias.to(self.expert_bias.device)
        return self

    def forward(self, x: Tensor, report: bool = True) -> tuple[Tensor, Tensor, RouterStats | None]:
        """Return (weights [tokens, k] fp32, experts [tokens, k] int64, statistics) of x [tokens, dim].

        Args:
            x: the tokens.
            report: whether statistics are wanted; None else, which saves a seventh of the time that a token takes to be
                generated.
        """
        if self.training and self.moe.jitter > 0:
            x = x * torch.empty_like(x).uniform_(1 - self.moe.jitter, 1 + self.moe.jitter)
        with torch.autocast(x.device.type, enabled=False):
            # By its forward, not by its weight: who offloads or adapts a layer does so around its forward.
            return self.route(self.layer(x), report)

    def route(self, logits: Tensor, report: bool = True) -> tuple[Tensor, Tensor, RouterStats | None]:
        """Return what forward gives, of logits [tokens, num_experts]."""
        scores, probabilities = self.score(logits)
        weights, experts = self._select(scores)
        if self.moe.normalizes_weights:
            weights = _share(weights)
        return weights, experts, self._statistics(logits, probabilities, experts) if report else None

    def count(self, experts: Tensor) -> Tensor:
        """Return how many of the assignments [tokens, k] each expert gets, fp32 [num_experts]."""
        flat = experts.flatten()
        ones = torch.ones(flat.shape, dtype=torch.float32, device=flat.device)  # in bf16 256 and 1 are 256
        return ones.new_zeros(self.moe.num_experts).index_add(0, flat, ones)

    def _select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        if self.expert_bias is None:
            return scores.topk(self.moe.top_k, dim=-1)
        experts = (scores.detach() + self.expert_bias).topk(self.moe.top_k, dim=-1).indices
        return scores.gather(-1, experts), experts

    def _statistics(self, logits: Tensor, probabilities: Tensor, experts: Tensor) -> RouterStats:
        counts = self.count(experts).to(logits.dtype)
        shared = _mean_over_processes(counts) if self.training else counts
        balance = self.moe.num_experts / experts.numel() * (shared * probabilities.mean(dim=0)).sum()
        z_loss = logits.logsumexp(dim=-1).square().mean()
        tiny = torch.finfo(probabilities.dtype).tiny
        with torch.no_grad():
            if self.expert_bias is None and self.moe.top_k > 1:  # the first two are known, and in order
                top = probabilities.gather(-1, experts[:, :2])
            else:
                top = probabilities.topk(min(2, self.moe.num_experts), dim=-1).values
            return RouterStats(
                counts,
                balance,
                z_loss,
                entropy=-(probabilities * probabilities.clamp_min(tiny).log()).sum(dim=-1).mean(),
                top1_margin=(top[:, 0] - top[:, 1:].sum(dim=-1)).mean(),
                logits_norm=logits.norm(dim=-1).mean(),
            )

    @torch.no_grad()
    def update_bias(self, tokens_per_expert: Tensor) -> None:
        """Add rate sign(mean load - load_e) to b_e, after an optimizer step (2408.15664, algorithm 1).

        The bias takes part in the selection alone, so it balances without a gradient of its own. Nothing happens under
        another kind of balancing.

        Args:
            tokens_per_expert: [num_experts], over all batches and processes of that step.
        """
        if self.expert_bias is not None:
            error = tokens_per_expert.mean() - tokens_per_expert
            self.expert_bias += self.moe.bias_update_rate * error.sign()
