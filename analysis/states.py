"""Hidden states on their way through the blocks: how to see them, and what one number says about them."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.layers.rope import Rope
from lightning_modules.trunk import Block, Trunk
from spannorm import Gated, Mapping


class BlockView(NamedTuple):
    """One block during a forward pass; all but state, number and rope are [batch, seq, dim].

    The hidden state is what the placement hands on (before a final norm), as its method `hidden` gives it: of several
    streams one vector [batch, seq, streams x dim], of attention residuals the mean of the sources.

    Attributes:
        number: of the block, counted from 1.
        block: the block itself.
        before: hidden state before the block.
        attn_input: what attention reads.
        rope: its positions.
        attn_out: what attention adds.
        ffn_out: what the FFN adds.
        state: the hidden state after the block, as the placement has it.
        mappings: of each sublayer (the streams before it [rows, n, dim], their spannorm.Mapping); empty where the
            placement has one stream.
        weights: of each source in what a sublayer reads, [sources, batch, seq], by the names of Placement.readers.
        gates: the mean of the gates of each gated part, by its name in the block.
    """

    number: int
    block: Block
    before: Tensor
    attn_input: Tensor
    rope: Rope
    attn_out: Tensor
    ffn_out: Tensor
    state: Any
    weights: dict[str, Tensor]
    gates: dict[str, Tensor]
    mappings: tuple[tuple[Tensor, Mapping], ...] = ()

    @property
    def after(self) -> Tensor:
        """Hidden state after the block."""
        return self.block.placement.hidden(self.state)


@contextmanager
def watching(model: Trunk, see: Callable[[BlockView], None]) -> Iterator[None]:
    """Call `see` with each block of each forward pass within the context, as soon as the block has run.

    Args:
        model: running uncompiled and without activation checkpointing: hooks would not see every block once.
    """
    inner: dict[str, Any] = {}
    mappings: list[tuple[Tensor, Mapping]] = []
    weights: dict[str, Tensor] = {}
    gates: dict[str, list[Tensor]] = {}

    def keep_attn(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        inner.update(attn_input=inputs[0], rope=inputs[1], attn_out=output * model.branch_multiplier)

    def keep_ffn(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        inner.update(ffn_out=output[0] * model.branch_multiplier)

    def keep_states(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):  # what a block hands on as it got it is told from what the block got
            output = tuple(stream.view_as(stream) for stream in output)
        inner.update(before=module.hidden(inputs[0]), state=output)
        return output

    def keep_weights(name: str) -> Callable[[Any, tuple[Any, ...], Any], None]:
        return lambda module, inputs, output: weights.update({name: module.weights(*inputs).detach()})

    def keep_gates(name: str) -> Callable[[Any, tuple[Any, ...], Any], None]:
        def keep(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            gates.setdefault(name, []).append(module.gates(*inputs).detach().flatten())  # an expert at a time

        return keep

    def keep_mapping(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        mappings.append((inputs[0], output[-1]))

    def end_of(number: int, block: Block) -> Callable[[Any, tuple[Any, ...], Any], None]:
        def end(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            means = {name: torch.cat(parts).mean() for name, parts in gates.items()}
            kept: dict[str, Any] = {"mappings": tuple(mappings), "weights": dict(weights), "gates": means}
            see(BlockView(number, block, **inner, **kept))
            inner.clear()
            mappings.clear()
            weights.clear()
            gates.clear()

        return end

    with ExitStack() as hooks:
        for number, block in enumerate(model.blocks, start=1):
            assert isinstance(block, Block)
            for handle in (
                block.attn.register_forward_hook(keep_attn),
                block.ffn.register_forward_hook(keep_ffn),
                *(mapping.register_forward_hook(keep_mapping) for mapping in block.placement.mappings()),
                block.placement.register_forward_hook(keep_states),
                *(
                    reader.register_forward_hook(keep_weights(name))
                    for name, reader in block.placement.readers().items()
                ),
                *(part.register_forward_hook(keep_gates(name)) for name, part in gated_parts(block).items()),
                block.register_forward_hook(end_of(number, block), prepend=True),  # before FSDP2 reshards
            ):
                hooks.callback(handle.remove)
        yield


def gated_parts(block: Block) -> dict[str, Any]:
    """Return the parts of a block that have gates, by name."""
    return {name: part for name, part in block.named_modules() if isinstance(part, Gated)}


def streams(state: Any) -> tuple[Tensor, ...]:
    """Return the tensors of a state: [batch, seq, dim], or several streams in one, [batch, seq, streams, dim]."""
    return tuple(state) if isinstance(state, tuple | list) else (state,)


def mean_square(x: Tensor) -> Tensor:
    """Mean over all entries, a scalar."""
    return x.detach().float().square().mean()


def kurtosis(x: Tensor) -> Tensor:
    """Return token_kurtosis, averaged over the tokens; x [..., dim]."""
    return token_kurtosis(x).mean()


def token_kurtosis(x: Tensor) -> Tensor:
    """Return E x^4 / (E x^2)^2 over the features of each token, [...], of x [..., dim].

    3 for Gaussian features; dim where one feature is all there is.
    """
    square = x.detach().float().square()
    return square.square().mean(-1) / square.mean(-1).square()


def mean_cosine(x: Tensor) -> Tensor:
    """Mean cosine similarity over all pairs of different tokens of a sequence; x [batch, seq, dim], seq >= 2."""
    unit = F.normalize(x.detach().float(), dim=-1)
    seq = x.size(1)
    return ((unit.sum(1).square().sum(-1) - seq) / (seq * (seq - 1))).mean()


def effective_rank(x: Tensor) -> Tensor:
    """Return exp of the entropy of each sequence's normalized singular values (Roy and Vetterli 2007), averaged.

    x [batch, seq, dim] -> a number between 1 and min(seq, dim); nan where x overflowed.
    """
    x = x.detach().cpu() if x.device.type == "mps" else x.detach()  # which has neither float64 nor eigenvalues
    finite = x.isfinite().all(-1).all(-1)
    x = x.double() if x.size(1) <= x.size(2) else x.double().mT
    x = x.where(finite[:, None, None], 0.0)
    singular = torch.linalg.eigvalsh(x @ x.mT).clamp(min=0).sqrt()  # many times faster than svdvals
    share = singular / singular.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp().where(finite, math.nan).mean()
