"""One batch on its way through a model, block by block, with blocks left out or in another order."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from analysis.anatomy.forward import on_its_device
from analysis.anatomy.held_out import Batch
from lightning_modules.trunk import Block, Trunk

Skip = Literal["placement", "identity"]
"""How a block is left out: by its placement's equation with sublayers that put out zeros, or by passing over it."""


class Passage:
    """Takes a batch through a model. The state is the placement's, whatever it is made of.

    Args:
        model: uncompiled.
        batch: what goes through it.
    """

    def __init__(self, model: Trunk, batch: Batch) -> None:
        self.model, self.rows = model, on_its_device(model, batch.rows)
        self.entry = model.entry(self.rows)
        self.targets = batch.targets.to(self.entry.stream.device)

    def blocks(self) -> list[Block]:
        """Return the model's blocks, in order."""
        return [block for block in self.model.blocks if isinstance(block, Block)]

    def enter(self) -> Any:
        """Return the state before the first block."""
        return self.blocks()[0].enter(self.entry.stream)

    def through(self, state: Any, blocks: Iterable[Block]) -> Any:
        """Return the state after these blocks, in the order in which they are given."""
        for block in blocks:
            state, _ = block.transform(state, self.entry.rope, self.entry.mask)
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

    def read(self, state: Any) -> Tensor:
        """Return what the head reads for each target where this is the last state, [batch, asked, dim]."""
        return self.model.read(self.blocks()[-1].placement.leave(state), self.rows)

    def losses(self, state: Any) -> Tensor:
        """Return the loss of each target in nats, [batch, asked], where this is the last state."""
        return self.model.losses(self.read(state), self.targets)

    def logits(self, state: Any) -> Tensor:
        """Return the logits of each target, [batch, asked, rows of the head], where this is the last state."""
        return self.model.logits(self.read(state))
