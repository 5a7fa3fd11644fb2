"""Dropless token-choice mixture of SwiGLU experts, in MegaBlocks' parameter layout (2211.15841)."""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_modules.config import ModelConfig
from lightning_modules.layers.experts import choose_backend, make_experts
from lightning_modules.layers.ffn import FeedForward
from lightning_modules.layers.norms import norm_matrices
from lightning_modules.layers.router import Router, RouterStats
from spannorm import Matrix


class MoE(nn.Module):
    """Router, routed experts, and shared ones beside them; a drop-in for FeedForward.

    Args:
        config: `model.moe`, dim, width of an expert and norm kind.
        inner_norm: one norm, shared by the routed experts, before their output projections (2210.06423), and another
            one over the hidden layers of all shared experts together.

    Attributes:
        backend: which one computes the experts, and why.
    """

    def __init__(self, config: ModelConfig, inner_norm: bool = False) -> None:
        super().__init__()
        self.config = config
        self.backend = choose_backend(config, inner_norm)
        self.router = Router(config)
        self.experts = make_experts(config, inner_norm, self.backend.name)
        # n SwiGLUs side by side are one, n times as wide.
        width = config.moe.num_shared_experts * config.shared_expert_hidden_dim
        self.shared_expert = FeedForward(replace(config, ffn_dim=width), inner_norm) if width else None

    def forward(self, x: Tensor, *, report: bool = True) -> tuple[Tensor, RouterStats | None]:
        """Return (output of x's shape [batch, seq, dim], this layer's RouterStats; None: they are not wanted)."""
        tokens = x.flatten(0, -2)
        weights, experts, stats = self.router(tokens, report)
        counts = self.router.count(experts) if stats is None else stats.tokens_per_expert
        out = self.experts(tokens, weights, experts, counts).view_as(x)
        if self.shared_expert is None:
            return out, stats
        shared, _ = self.shared_expert(x)
        if self.config.moe.shared_expert_weighted_sum:
            top_k = self.config.moe.top_k
            return shared / (top_k + 1) + out * (top_k / (top_k + 1)), stats
        return shared + out, stats

    def shard_experts(self, mesh: DeviceMesh) -> None:
        """Share the routed experts out over processes that have the same weights; see expert_parallel.

        Args:
            mesh: those processes, of one dimension.
        """
        self.experts.shard(mesh)

    def matrices(self) -> Iterator[Matrix]:
        router, mlp = self.router.layer, self.experts.mlp
        dim, hidden, moe = self.config.dim, self.config.expert_hidden_dim, self.config.moe
        explicit = self.config.ffn_dim is not None or moe.expert_dim is not None
        yield Matrix("router", router.weight, dim, moe.num_experts)
        yield Matrix("ffn_up", mlp.w1, dim, hidden, explicit)
        yield Matrix("ffn_up", mlp.v1, dim, hidden, explicit)
        yield Matrix("ffn_down", mlp.w2, hidden, dim, explicit)
        yield from norm_matrices(self.experts, explicit, reads_hidden=True)
        if self.shared_expert is not None:
            explicit = explicit or moe.shared_expert_dim is not None
            for matrix in self.shared_expert.matrices():
                of_hidden = matrix.role != "residual" or matrix.reads_hidden
                yield matrix._replace(width_is_explicit=explicit) if of_hidden else matrix

    def num_idle_parameters(self) -> int:
        """Return those of the experts that a token does not go to."""
        idle = self.config.moe.num_experts - self.config.moe.top_k
        return 3 * self.config.dim * self.config.expert_hidden_dim * idle
