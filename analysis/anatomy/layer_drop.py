"""Measures what the loss becomes where blocks are left out, or change places with their neighbours."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from analysis.anatomy.findings import Curve, Findings, Picture
from analysis.anatomy.held_out import HeldOut, Tally
from analysis.anatomy.measure import Measure
from analysis.anatomy.passage import Passage, Skip
from lightning_modules.trunk import Trunk

SKIPS = {
    "placement": "A block is left out by its placement's own equation, with sublayers that put out zeros: under "
    "PreNorm that is the identity, under SpanNorm N(x), under a scheme of several streams their mixing.",
    "identity": "A block is left out as if it were not there, with its norms.",
}


@dataclass(frozen=True)
class LayerDrop(Measure):
    """Measures the loss without each block, with neighbours swapped, and without the last ones.

    | name | what |
    |---|---|
    | loss | of the whole model, nats per target |
    | layer_drop | mean over blocks of what the loss is more where the block is left out |
    | late_drop | that over the later half of the blocks |
    | drop_by_block | that of each block |
    | swap_by_block | what it is more where the block and the next change places |
    | cut_by_count | what it is more where so many of the last blocks are left out |

    Attributes:
        skip: how a block is left out: by the placement's equation with sublayers of zeros, or by passing over it.
    """

    name: ClassVar[str] = "layer_drop"
    about: ClassVar[str] = "loss without each block, with neighbours swapped, without the last blocks"
    outcomes: ClassVar[tuple[str, ...]] = ("loss", "layer_drop", "late_drop")

    skip: Skip = "placement"

    @torch.inference_mode()
    def __call__(self, model: Trunk, data: HeldOut) -> Findings:
        depth, targets = len(model.blocks), data.num_targets
        whole, drops, swaps, cuts = (Tally(data, rows) for rows in (1, depth, depth - 1, depth))
        for batch in data:
            passage = Passage(model, batch)
            blocks, states = passage.blocks(), passage.states()
            losses = passage.losses(states[-1])
            whole.add(0, batch, losses)
            for place in range(depth):
                left_out = passage.through(passage.skip(states[place], [blocks[place]], self.skip), blocks[place + 1 :])
                drops.add(place, batch, passage.losses(left_out) - losses)
                cut = passage.skip(states[place], blocks[place:], self.skip)
                cuts.add(depth - place - 1, batch, passage.losses(cut) - losses)
                if place < depth - 1:
                    swapped = passage.through(states[place], [blocks[place + 1], blocks[place], *blocks[place + 2 :]])
                    swaps.add(place, batch, passage.losses(swapped) - losses)
        by_document = {
            "loss": whole.sums,
            "layer_drop": drops.sums.mean(0, keepdims=True),
            "late_drop": drops.sums[depth // 2 :].mean(0, keepdims=True),
            "drop_by_block": drops.sums,
            "swap_by_block": swaps.sums,
            "cut_by_count": cuts.sums,
        }
        means = {name: (sums.sum(1) / targets).tolist() for name, sums in by_document.items()}
        return Findings(
            scalars={name: means[name][0] for name in self.outcomes},
            curves={
                "drop_by_block": Curve(means["drop_by_block"]),
                "swap_by_block": Curve(means["swap_by_block"]),
                "cut_by_count": Curve(means["cut_by_count"], "last blocks left out"),
            },
            by_document=by_document,
            pictures=(
                Picture(
                    "layer_drop", "curves", ("drop_by_block",), "loss without the block, less the loss (nats)", True
                ),
                Picture(
                    "layer_swap", "curves", ("swap_by_block",), "loss with the next one first, less the loss (nats)"
                ),
                Picture("layer_cut", "curves", ("cut_by_count",), "loss without the last blocks, less the loss (nats)"),
            ),
            notes=(SKIPS[self.skip],),
        )
