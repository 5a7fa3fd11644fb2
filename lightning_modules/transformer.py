"""The transformer of a language: tokens in, logits over the vocabulary out."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import require
from lightning_modules.config import ModelConfig
from lightning_modules.cross_entropy import linear_cross_entropy
from lightning_modules.layers.cpu_kernels import use_cpu_kernels
from lightning_modules.layers.cpu_kernels.linear import matmul
from lightning_modules.layers.document_mask import Mask, document_mask
from lightning_modules.layers.kv_cache import KVCache
from lightning_modules.layers.rope import Rope, at_positions, rope_tables
from lightning_modules.layers.router import RouterStats
from lightning_modules.trunk import Asked, Batch, Block, Count, Entry, Trunk
from spannorm import Matrix

EXAMPLE_VOCABULARY = 256
"""Examples are drawn from so many tokens, whatever the vocabulary: few repeat in a sequence, and some do."""


class Transformer(Trunk):
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
        super().__init__(config, output_multiplier, branch_multiplier)
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.add_blocks(built)
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
        at: Tensor | None = None,
    ) -> tuple[Any, list[RouterStats]]:
        """Return the logits of the tokens to predict, or the losses of given targets without ever holding all logits.

        Args:
            tokens: [batch, seq].
            positions: [batch, seq], of each token in its document, where attention must not cross documents; with a
                cache, in its sequence.
            cache: of the tokens before these, which join them.
            targets: [batch, seq], the tokens to predict; with `at`, those at these positions.
            logits_to_keep: of the last so many positions; None: of all.
            at: [batch, chosen], the positions that are read out; None: all.

        Returns:
            (logits [batch, seq or fewer, vocab_size], or the targets' Losses; one RouterStats per MoE layer).

        Raises:
            ConfigError: a cache without causal attention, where tokens to come change what the earlier ones keep.
        """
        valid = "true with a cache of keys and values: without causal attention each further token changes all of them"
        require(cache is None or self.config.causal, "model.causal", self.config.causal, valid)
        state, router_stats = self.states(tokens, positions, cache)
        if at is not None:
            state = at_places(state, at)
        return self.read_out(state, targets, logits_to_keep), router_stats

    def states(
        self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, list[RouterStats]]:
        """Return (what `read_out` takes, [batch, seq, dim]; router statistics): `forward` without the head."""
        rope, mask = self.surroundings(tokens, positions, cache)
        slots = None if cache is None or positions is None else cache.at(positions)
        return self.through_blocks(self.embedding(tokens), rope, mask, slots)

    def surroundings(
        self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Rope, Mask | None]:
        """Return what every block takes beside its state; the arguments are those of `forward`."""
        settings = self.config.head_width, self.config.rope_theta, tokens.device
        rope = rope_tables(tokens.size(1), *settings) if cache is None else cache.rope(*settings)
        if positions is None:
            return rope, None
        flex = tokens.is_cuda and self.config.compile
        mask = document_mask(positions, flex, self.config.causal) if cache is None else cache.mask(positions)
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

    def count(self, batch: Batch) -> Count:
        samples, tokens = batch["tokens"].shape
        return Count(samples, tokens - 1, samples * (tokens - 1))

    def can_read(self, batch: Batch) -> bool:
        ids = batch.get("tokens")
        if ids is None or ids.ndim != 2 or ids.is_floating_point() or ids.numel() == 0:
            return False
        return int(ids.min()) >= 0 and int(ids.max()) < self.embedding.num_embeddings

    def excerpt(self, batch: Batch, samples: int, positions: int | None = None) -> Batch:
        """Return the first tokens of the first sequences; documents packed into one are then one text."""
        return {"tokens": batch["tokens"][:samples, : None if positions is None else positions + 1]}

    def observe(self, batch: Batch) -> None:
        self(self.tokens(batch), logits_to_keep=1)  # nobody looks at them

    def loss(self, batch: Batch, chunked: bool = False) -> Tensor:
        """Return the mean cross-entropy of the following tokens, in nats; documents packed into one are one text."""
        inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        if chunked:
            losses, _ = self(inputs, targets=targets)
            mean: Tensor = losses.mean
            return mean
        logits, _ = self(inputs)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def tokens(self, batch: Batch) -> Tensor:
        return batch["tokens"][:, :-1]

    def entry(self, batch: Batch) -> Entry:
        tokens = self.tokens(batch)
        return Entry(self.embedding(tokens), *self.surroundings(tokens, batch.get("positions")))

    def asked(self, batch: Batch) -> Asked:
        """Return the token that follows each."""
        targets = batch["tokens"][:, 1:]
        return Asked(targets, torch.arange(targets.size(1), device=targets.device).expand_as(targets))

    def read(self, state: Tensor, batch: Batch) -> Tensor:
        return state

    def logits(self, read: Tensor) -> Tensor:
        logits: Tensor = self.read_out(read)
        return logits

    def losses(self, read: Tensor, targets: Tensor) -> Tensor:
        by_token: Tensor = self.read_out(read, targets).by_token
        return by_token.view_as(targets)

    def example(self, samples: int, positions: int, generator: torch.Generator | None = None) -> Batch:
        most = min(self.embedding.num_embeddings, EXAMPLE_VOCABULARY)
        return {"tokens": torch.randint(most, (samples, positions + 1), generator=generator)}

    def embedding_std(self, stds: dict[Tensor, float]) -> float:
        return stds[self.embedding.weight]

    def outside_matrices(self) -> Iterator[Matrix]:
        dim, vocab_size = self.config.dim, self.embedding.num_embeddings
        # A lookup sums one row; a tied matrix is used as a head too, and that is what bounds its scale.
        yield Matrix("embedding", self.embedding.weight, dim if self.config.tie_embeddings else 1, dim)
        if not self.config.tie_embeddings:
            yield Matrix("head", self.head.weight, dim, vocab_size)

    def num_looked_up(self) -> int:
        return 0 if self.config.tie_embeddings else self.embedding.weight.numel()


def at_places(state: Tensor, at: Tensor) -> Tensor:
    """Return the vectors of state [batch, seq, dim] at these positions, int64 [batch, chosen]: [batch, chosen, dim]."""
    return state.gather(1, at[..., None].expand(-1, -1, state.size(-1)))
