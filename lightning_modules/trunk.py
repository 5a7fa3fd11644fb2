"""The part of a model that knows nothing of what it models: the only place where a placement and its sublayers meet."""

from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.errors import lookup, require
from core.options import check_arguments
from lightning_modules.argument_errors import as_config_errors, as_error_of_own
from lightning_modules.config import ModelConfig
from lightning_modules.layers.attention import Attention
from lightning_modules.layers.cpu_kernels import use_cpu_kernels
from lightning_modules.layers.document_mask import Mask
from lightning_modules.layers.ffn import MLP, DenseFFN, FeedForward
from lightning_modules.layers.kv_cache import Slots
from lightning_modules.layers.moe import MoE
from lightning_modules.layers.norms import norm_factory
from lightning_modules.layers.rope import Rope
from lightning_modules.layers.router import RouterStats
from spannorm import Depth, Matrix, Role, find_placement

Batch = dict[str, Tensor]
FFNS: dict[str, type[DenseFFN] | type[MoE]] = {"dense": FeedForward, "mlp": MLP, "moe": MoE}
KINDS: dict[Role, str] = dict.fromkeys(("query", "key", "value"), "attn_in")
"""The kinds of matrices in parameter_groups whose name is not their role."""


class Count(NamedTuple):
    """Says how much there is in a batch.

    Attributes:
        samples: sequences, or images.
        positions: of each: tokens that the model reads, or patches.
        units: what a run is counted in (core.task.Task.counted): tokens, or images.
    """

    samples: int
    positions: int
    units: int


class Entry(NamedTuple):
    """Holds what the blocks take of a batch; the arguments of `Trunk.through_blocks`.

    Attributes:
        stream: the embedding output, [batch, positions, dim].
        rope: of the positions; None: attention does not rotate.
        mask: who may look at whom; None: as `model.causal` says.
    """

    stream: Tensor
    rope: Rope | None
    mask: Mask | None = None


class Asked(NamedTuple):
    """Says what a batch asks of a model: a target at each of some positions.

    Attributes:
        targets: int64 [batch, asked], what is to be predicted: tokens, or the class of an image.
        at: int64 [batch, asked], the position of each; of an image, which is asked for as a whole, the first.
    """

    targets: Tensor
    at: Tensor


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
        self, state: Any, rope: Rope | None, mask: Mask | None = None, slots: Slots | None = None
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
        self, state: Any, rope: Rope | None, mask: Mask | None = None, slots: Slots | None = None
    ) -> tuple[Any, RouterStats | None]:
        """Return what `forward` does, of and as the placement's state at either end of the model too."""
        stats: RouterStats | None = None

        def attn(x: Tensor) -> Tensor:
            return self._scaled(self.attn(x, rope, mask, slots))

        def ffn(x: Tensor) -> Tensor:
            nonlocal stats
            # Nobody looks at the routers of a text that is written.
            out, stats = self.ffn(x) if slots is None else self.ffn(x, report=False)
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


class Trunk(nn.Module):
    """Blocks, without what makes a stream of the inputs and a prediction of the stream: subclasses have that.

    What monitors, tools and analyses ask of a model, they ask by the methods of this class, and never what its batches
    are made of. A subclass makes its parts in the order in which parameters are to stand, `add_blocks` among them, and
    says what is abstract here.

    Args:
        config: the architecture of the blocks.
        output_multiplier: on what the head reads; not 1 only under width scaling.
        branch_multiplier: on what each attention and FFN puts out; not 1 only under depth scaling.

    Attributes:
        blocks: in order.
        head: whose rows are what there is to choose from: tokens, or classes.

    Raises:
        ConfigError: a name that is in no registry, or an option that its scheme does not have.
    """

    blocks: nn.ModuleList
    head: nn.Linear

    def __init__(self, config: ModelConfig, output_multiplier: float = 1.0, branch_multiplier: float = 1.0) -> None:
        super().__init__()
        self.config = config
        self.output_multiplier, self.branch_multiplier = output_multiplier, branch_multiplier

    def add_blocks(self, built: Callable[[Block], None]) -> None:
        """Make the blocks.

        Args:
            built: called with each block as soon as it is built: what shards it then never holds two in full.
        """
        config = self.config
        self.blocks = nn.ModuleList()
        for index in range(1, config.num_layers + 1):
            block = Block(config, Depth(index, config.num_layers), self.branch_multiplier)
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

    def through_blocks(
        self, state: Any, rope: Rope | None, mask: Mask | None = None, slots: Iterable[Slots | None] | None = None
    ) -> tuple[Tensor, list[RouterStats]]:
        """Take the embedding output [batch, seq, dim] through all blocks.

        Args:
            state: the embedding output.
            rope: of the positions; None: attention does not rotate.
            mask: who may look at whom; None: as `model.causal` says.
            slots: of each block, where keys and values are kept.

        Returns:
            (what the head reads, [batch, seq, dim]; one RouterStats per MoE layer).
        """
        router_stats: list[RouterStats] = []
        checkpointing = self.config.activation_checkpointing and torch.is_grad_enabled()
        of_blocks = zip(self.blocks, repeat(None) if slots is None else slots, strict=False)
        for number, (block, slot) in enumerate(of_blocks, start=1):
            if checkpointing and number % self.config.activation_checkpoint_every == 0:
                state, stats = checkpoint(block, state, rope, mask, use_reentrant=False)
            else:
                state, stats = block(state, rope, mask, slot)
            if stats is not None:
                router_stats.append(stats)
        return state, router_stats

    def count(self, batch: Batch) -> Count:
        """Return how much there is in a batch."""
        raise NotImplementedError

    def can_read(self, batch: Batch) -> bool:
        """Return whether a batch, wherever it comes from, is one that the model can be asked about."""
        raise NotImplementedError

    def excerpt(self, batch: Batch, samples: int, positions: int | None = None) -> Batch:
        """Return the first samples of a batch, and of each the first positions where it can be cut; all: None."""
        raise NotImplementedError

    def observe(self, batch: Batch) -> None:
        """Take a batch through the blocks, for what hooks see of it."""
        raise NotImplementedError

    def loss(self, batch: Batch, chunked: bool = False) -> Tensor:
        """Return the mean loss of a batch in nats, a scalar, without auxiliary losses.

        Args:
            batch: whole, or an excerpt.
            chunked: whether it is to be taken as training takes it of a large vocabulary, a part of the logits at once.
        """
        raise NotImplementedError

    def entry(self, batch: Batch) -> Entry:
        """Return what the blocks take of a batch; documents that it keeps apart do not see each other."""
        raise NotImplementedError

    def asked(self, batch: Batch) -> Asked:
        """Return what a batch asks, whatever the weights are."""
        raise NotImplementedError

    def tokens(self, batch: Batch) -> Tensor | None:
        """Return the token that each position stands for, int64 [batch, positions]; None: they stand for none."""
        raise NotImplementedError

    def read(self, state: Tensor, batch: Batch) -> Tensor:
        """Return what the head reads for each target, [batch, asked, dim].

        Args:
            state: what the last block has returned, or another one of its shape, [batch, positions, dim].
            batch: which it is of.
        """
        raise NotImplementedError

    def logits(self, read: Tensor) -> Tensor:
        """Return the logits, [..., rows of the head], of what the head reads, [..., dim]."""
        raise NotImplementedError

    def losses(self, read: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each target [batch, asked] in nats, fp32, of what the head reads [batch, asked, dim]."""
        raise NotImplementedError

    def example(self, samples: int, positions: int, generator: torch.Generator | None = None) -> Batch:
        """Return a batch of random inputs.

        Args:
            samples: how many.
            positions: of each, where the model does not fix them.
            generator: what they are drawn from; None: torch's.
        """
        raise NotImplementedError

    def embedding_std(self, stds: dict[Tensor, float]) -> float:
        """Return the standard deviation of the embedding output, of those that matrices are drawn with."""
        raise NotImplementedError

    def outside_matrices(self) -> Iterator[Matrix]:
        """Yield the matrices outside of the blocks, with their roles: embeddings and head."""
        raise NotImplementedError

    def matrices(self) -> Iterator[Matrix]:
        """Yield every weight matrix, with its role. Norm gains and biases are what is left."""
        yield from self.outside_matrices()
        for block in self.blocks:
            assert isinstance(block, Block)
            yield from block.matrices()

    def _outside(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that are in no block, in their order."""
        inside = {id(parameter) for parameter in self.blocks.parameters()}
        yield from (parameter for parameter in self.parameters() if id(parameter) not in inside)

    def parameter_groups(self) -> Iterator[tuple[int, str, Tensor]]:
        """Yield (block, kind, parameter) for each parameter, once. Blocks count from 1; 0 is outside of them.

        Kinds: embedding, head; attn_in, attn_out, ffn_up, ffn_down, router, experts (the routed ones' matrices),
        residual (those of placements and norms), and norm for what is left: gains, biases and gates.
        """
        outside = {matrix.weight: matrix.role for matrix in self.outside_matrices()}
        for parameter in self._outside():
            yield 0, outside.get(parameter, "norm"), parameter
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
        yield from self._outside()
        for block in self.blocks:
            assert isinstance(block, Block)
            yield from block.embedding_scale.parameters()
            yield from block.placement.final_norm.parameters()

    def num_parameters(self) -> tuple[int, int]:
        """Return (total, active) parameters; active are top_k of num_experts routed experts, and every shared one."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total, total - sum(moe.num_idle_parameters() for moe in self.mixtures().values())

    def num_looked_up(self) -> int:
        """Return how many parameters outside of the blocks multiply nothing: tables that are looked up, or added."""
        raise NotImplementedError

    def flops_per_token(self, seq_len: int) -> float:
        """Return a training step's: 6 an active parameter that multiplies, and attention's (2204.02311, appendix B).

        As is usual, the causal mask is not credited, and what activation checkpointing computes twice counts once. Nor
        is the mixing of streams, some 3 / dim of a block's.
        """
        _, active = self.num_parameters()
        attention = 12 * self.config.num_layers * self.config.attention_width * seq_len
        return 6 * (active - self.num_looked_up()) + attention

    def mixtures(self) -> dict[int, MoE]:
        """Return the MoE layers by number, counted from 1 over all layers; in the order of forward's statistics."""
        layers = {number: block.ffn for number, block in enumerate(self.blocks, start=1)}
        return {number: ffn for number, ffn in layers.items() if isinstance(ffn, MoE)}
