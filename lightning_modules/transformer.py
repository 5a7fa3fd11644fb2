"""The decoder-only transformer: the only place where a placement and its sublayers meet."""

from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.errors import lookup, require
from core.options import check_arguments
from lightning_modules.argument_errors import as_config_errors, as_error_of_own
from lightning_modules.config import ModelConfig
from lightning_modules.cross_entropy import linear_cross_entropy
from lightning_modules.layers.attention import Attention
from lightning_modules.layers.cpu_kernels import use_cpu_kernels
from lightning_modules.layers.cpu_kernels.linear import matmul
from lightning_modules.layers.document_mask import Mask, document_mask
from lightning_modules.layers.ffn import FeedForward
from lightning_modules.layers.kv_cache import KVCache, Slots
from lightning_modules.layers.moe import MoE
from lightning_modules.layers.norms import norm_factory
from lightning_modules.layers.rope import Rope, at_positions, rope_tables
from lightning_modules.layers.router import RouterStats
from spannorm import Depth, Matrix, Role, find_placement

FFNS: dict[str, type[FeedForward] | type[MoE]] = {"dense": FeedForward, "moe": MoE}
KINDS: dict[Role, str] = dict.fromkeys(("query", "key", "value"), "attn_in")
"""The kinds of matrices in parameter_groups whose name is not their role."""


class Block(nn.Module):
    """One placement around one attention and one FFN.

    Args:
        config: of the model.
        depth: which block this is, of how many.
        branch_multiplier: on what attention and FFN put out; not 1 only under depth scaling.
    """

    def __init__(self, config: ModelConfig, depth: Depth, branch_multiplier: float = 1.0) -> None:
        super().__init__()
        self.branch_multiplier = branch_multiplier
        norm = norm_factory(config, config.dim)
        with as_config_errors("model.placement_options"):
            scheme = find_placement(config.placement)
            check_arguments("model.placement_options", scheme, config.placement_options, "depth", "norm")
            with as_error_of_own("model.placement", config.placement):
                self.placement = scheme(depth, norm, **config.placement_options)
        self.attn = Attention(config, self.placement.qkv_norm, self.placement.inner_norm)
        ffn = lookup("model.ffn", config.ffn, FFNS)
        if ffn is MoE and not config.moe.is_mixture(depth.index):
            ffn = FeedForward
        self.ffn = ffn(config, self.placement.inner_norm)
        self.embedding_scale = norm.embedding_scale() if depth.is_first else nn.Identity()

    def forward(
        self, state: Any, rope: Rope, mask: Mask | None = None, slots: Slots | None = None
    ) -> tuple[Any, RouterStats | None]:
        """Return (the placement's state after the block, router statistics of a MoE layer), from the state before it.

        The first block takes the embedding output, and the last returns one stream, both [batch, seq, dim].
        """
        # Inside the block rather than around it, so that sharding and compilation per block cover these norms too.
        if self.placement.depth.is_first:
            state = self.enter(state)
        state, stats = self.transform(state, rope, mask, slots)
        if self.placement.depth.is_last:
            state = self.placement.leave(state)
        return state, stats

    def enter(self, embedded: Tensor) -> Any:
        """Return the placement's state before the first block, of the embedding output [batch, seq, dim]."""
        return self.placement.enter(self.embedding_scale(embedded))

    def transform(
        self, state: Any, rope: Rope, mask: Mask | None = None, slots: Slots | None = None
    ) -> tuple[Any, RouterStats | None]:
        """Return what `forward` does, of and as the placement's state at either end of the model too."""
        stats: RouterStats | None = None

        def attn(x: Tensor) -> Tensor:
            return self._scaled(self.attn(x, rope, mask, slots))

        def ffn(x: Tensor) -> Tensor:
            nonlocal stats
            out, stats = self.ffn(x)
            return self._scaled(out)

        return self.placement(state, attn, ffn), stats

    def _scaled(self, out: Tensor) -> Tensor:
        return out if self.branch_multiplier == 1 else out * self.branch_multiplier

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the block; or, where a graph would be made for every block, attention and FFN by themselves."""
        if not self.placement.state_grows:
            super().compile(*args, **kwargs)
            return
        self.attn.compile(*args, **kwargs)
        self.ffn.compile(*args, **kwargs)

    def matrices(self) -> Iterator[Matrix]:
        """Yield every weight matrix of attention, FFN and placement, with its role."""
        yield from self.attn.matrices()
        yield from self.ffn.matrices()
        yield from self.placement.matrices()


class Transformer(nn.Module):
    """Embedding, blocks, language-model head.

    Args:
        config: the architecture.
        vocab_size: rows of embedding and head.
        output_multiplier: on the logits; not 1 only under width scaling.
        branch_multiplier: on what each attention and FFN puts out; not 1 only under depth scaling.
        built: called with each block as soon as it is built: what shards it then never holds two in full.

    Raises:
        ConfigError: a name that is in no registry, or an option that its scheme does not have.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        output_multiplier: float = 1.0,
        branch_multiplier: float = 1.0,
        built: Callable[[Block], None] = lambda block: None,
    ) -> None:
        super().__init__()
        self.config = config
        self.output_multiplier, self.branch_multiplier = output_multiplier, branch_multiplier
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.blocks = nn.ModuleList()
        for index in range(1, config.num_layers + 1):
            block = Block(config, Depth(index, config.num_layers), branch_multiplier)
            if config.cpu_kernels == "auto":
                use_cpu_kernels(block)
            built(block)
            self.blocks.append(block)
        first = config.moe.first_dense_layers + config.moe.layer_interval
        valid = f"at least one mixture: first_dense_layers + layer_interval <= model.num_layers={config.num_layers}"
        require(
            config.ffn != "moe" or first <= config.num_layers,
            "model.moe.layer_interval",
            config.moe.layer_interval,
            valid,
        )
        self.head = nn.Linear(config.dim, vocab_size, bias=False)
        if config.cpu_kernels == "auto":
            use_cpu_kernels(self.head)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        targets: Tensor | None = None,
        logits_to_keep: int | None = None,
    ) -> tuple[Any, list[RouterStats]]:
        """Return next-token logits, or the losses of given targets without ever holding all logits.

        Args:
            tokens: [batch, seq].
            positions: [batch, seq], of each token in its document, where attention must not cross documents; with a
                cache, in its sequence.
            cache: of the tokens before these, which join them.
            targets: [batch, seq], the tokens to predict.
            logits_to_keep: of the last so many positions; None: of all.

        Returns:
            (logits [batch, seq or logits_to_keep, vocab_size], or the targets' Losses; one RouterStats per MoE layer).
        """
        rope, mask = self.surroundings(tokens, positions, cache)
        router_stats: list[RouterStats] = []
        state = self.embedding(tokens)
        slots = repeat(None) if cache is None or positions is None else cache.at(positions)
        checkpointing = self.config.activation_checkpointing and torch.is_grad_enabled()
        for number, (block, slot) in enumerate(zip(self.blocks, slots, strict=False), start=1):
            if checkpointing and number % self.config.activation_checkpoint_every == 0:
                state, stats = checkpoint(block, state, rope, mask, use_reentrant=False)
            else:
                state, stats = block(state, rope, mask, slot)
            if stats is not None:
                router_stats.append(stats)
        return self.read_out(state, targets, logits_to_keep), router_stats

    def surroundings(
        self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Rope, Mask | None]:
        """Return what every block takes beside its state; the arguments are those of `forward`."""
        settings = self.config.head_width, self.config.rope_theta, tokens.device
        rope = rope_tables(tokens.size(1), *settings) if cache is None else cache.rope(*settings)
        if positions is None:
            return rope, None
        flex = tokens.is_cuda and self.config.compile
        mask = document_mask(positions, flex) if cache is None else cache.mask(positions)
        return at_positions(rope, positions), mask

    def read_out(self, state: Tensor, targets: Tensor | None = None, logits_to_keep: int | None = None) -> Any:
        """Return the logits, or the targets' Losses, of what the last block has returned, [batch, seq, dim]."""
        state = state * self.output_multiplier
        if targets is None:
            return self.head(state if logits_to_keep is None else state[:, -logits_to_keep:])
        # Here, and not with the head's weight handed out: sharded, it is whole during forward only.
        state, targets = state.flatten(0, 1), targets.flatten()
        product = matmul if self.config.cpu_kernels == "auto" else F.linear
        return linear_cross_entropy(state, self.head.weight, targets, self.config.compile, product)

    def matrices(self) -> Iterator[Matrix]:
        """Yield every weight matrix, with its role. Norm gains and biases are what is left."""
        dim, vocab_size = self.config.dim, self.embedding.num_embeddings
        # A lookup sums one row; a tied matrix is used as a head too, and that is what bounds its scale.
        yield Matrix("embedding", self.embedding.weight, dim if self.config.tie_embeddings else 1, dim)
        if not self.config.tie_embeddings:
            yield Matrix("head", self.head.weight, dim, vocab_size)
        for block in self.blocks:
            assert isinstance(block, Block)
            yield from block.matrices()

    def parameter_groups(self) -> Iterator[tuple[int, str, Tensor]]:
        """Yield (block, kind, parameter) for each parameter, once. Blocks count from 1; 0 is outside of them.

        Kinds: embedding, head; attn_in, attn_out, ffn_up, ffn_down, router, experts (the routed ones' matrices),
        residual (those of placements and norms), and norm for what is left of a block: gains, biases and gates.
        """
        yield 0, "embedding", self.embedding.weight
        if not self.config.tie_embeddings:
            yield 0, "head", self.head.weight
        for number, block in enumerate(self.blocks, start=1):
            assert isinstance(block, Block)
            roles = {matrix.weight: matrix.role for matrix in block.matrices()}
            kinds = {weight: KINDS.get(role, role) for weight, role in roles.items()}
            if isinstance(block.ffn, MoE):
                experts = set(block.ffn.experts.parameters())
                kinds.update((w, "experts") for w, role in roles.items() if w in experts and role != "residual")
            for parameter in block.parameters():
                yield number, kinds.get(parameter, "norm"), parameter

    def outside_parameters(self) -> Iterator[Tensor]:
        """Yield the parameters that belong to no block's branches: embedding, its scale, head and final norm."""
        yield self.embedding.weight
        yield self.head.weight
        for block in self.blocks:
            assert isinstance(block, Block)
            yield from block.embedding_scale.parameters()
            yield from block.placement.final_norm.parameters()

    def num_parameters(self) -> tuple[int, int]:
        """Return (total, active) parameters; active are top_k of num_experts routed experts, and every shared one."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total, total - sum(moe.num_idle_parameters() for moe in self.mixtures().values())

    def flops_per_token(self, seq_len: int) -> float:
        """Return a training step's: 6 an active parameter that multiplies, and attention's (2204.02311, appendix B).

        As is usual, the causal mask is not credited, and what activation checkpointing computes twice counts once. Nor
        is the mixing of streams, some 3 / dim of a block's.
        """
        _, active = self.num_parameters()
        lookup_only = 0 if self.config.tie_embeddings else self.embedding.weight.numel()
        return 6 * (active - lookup_only) + 12 * self.config.num_layers * self.config.attention_width * seq_len

    def mixtures(self) -> dict[int, MoE]:
        """Return the MoE layers by number, counted from 1 over all layers; in the order of forward's statistics."""
        layers = {number: block.ffn for number, block in enumerate(self.blocks, start=1)}
        return {number: ffn for number, ffn in layers.items() if isinstance(ffn, MoE)}
