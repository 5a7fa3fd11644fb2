"""One batch on its way through a model, block by block, with blocks left out or in another order."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from analysis.anatomy.text import Batch
from lightning_modules.transformer import Block, Transformer

Skip = Literal["placement", "identity"]
"""How a block is left out: by its placement's equation with sublayers that put out zeros, or by passing over it."""


class Passage:
    """Takes a batch through a model. The state is the placement's, whatever it is made of.

    Args:
        model: uncompiled.
        batch: what goes through it.
    """

    def __init__(self, model: Transformer, batch: Batch) -> None:
        device = model.head.weight.device
        self.model, self.batch = model, batch
        self.inputs, self.targets = batch.inputs.to(device), batch.targets.to(device)
        positions = None if batch.positions is None else batch.positions.to(device)
        self.rope, self.mask = model.surroundings(self.inputs, positions)

    def blocks(self) -> list[Block]:
        """Return the model's blocks, in order."""
        return [block for block in self.model.blocks if isinstance(block, Block)]

    def enter(self) -> Any:
        """Return the state before the first block."""
        return self.blocks()[0].enter(self.model.embedding(self.inputs))

    def through(self, state: Any, blocks: Iterable[Block]) -> Any:
        """Return the state after these blocks, in the order in which they are given."""
        for block in blocks:
            state, _ = block.transform(state, self.rope, self.mask)
        return state

    def skip(self, state: Any, blocks: Iterable[Block], how: Skip = "placement") -> Any:
        """Return the state after these blocks where they are left out."""
        if how == "placement":
            for block in blocks:
                state = block.placement(state, torch.zeros_like, torch.zeros_like)
        return state

    def states(self) -> list[Any]:
        """Return the state before the first block and after each, depth 0 to the number of blocks."""
        states = [self.enter()]
        for block in self.blocks():
            states.append(self.through(states[-1], [block]))
        return states

    def leave(self, state: Any) -> Tensor:
        """Return what the head reads where this is the last state, [batch, seq, dim]."""
        return self.blocks()[-1].placement.leave(state)

    def losses(self, state: Any) -> Tensor:
        """Return the loss of each target in nats, [batch, seq], where this is the last state."""
        losses = self.model.read_out(self.leave(state), self.targets)
        return losses.by_token.view_as(self.targets)

    def logits(self, state: Any) -> Tensor:
        """Return the logits, [batch, seq, vocab_size], where this is the last state."""
        return self.model.read_out(self.leave(state))
