"""Measures what the loss becomes as more and more blocks are pruned, those that turn the state least first."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from analysis.anatomy.findings import Curve, Findings, Picture
from analysis.anatomy.held_out import HeldOut, Tally
from analysis.anatomy.layer_drop import SKIPS
from analysis.anatomy.measure import Measure
from analysis.anatomy.passage import Passage, Skip
from analysis.anatomy.similarity import angular_distances, hidden_states
from core.errors import require
from lightning_modules.trunk import Trunk


@dataclass(frozen=True)
class Pruning(Measure):
    """Measures the pruning curve of 2403.17887: of n blocks in a row, those are left out that turn the state least.

    | name | what |
    |---|---|
    | pruning_by_count | what the loss is more with so many blocks left out, nats per target |
    | pruned_from | the first of these blocks |
    | spare_blocks | so many blocks, and any fewer, can be left out for less than `tolerance` |

    The angle is that of a position's state before and after the n blocks, over all positions; the paper takes the last
    token of each of its sequences. Nothing is trained after it.

    Attributes:
        skip: how a block is left out: by the placement's equation with sublayers of zeros, or by passing over it, which
            is the paper's way.
        tolerance: in nats per target.
    """

    name: ClassVar[str] = "pruning"
    about: ClassVar[str] = "loss as more and more blocks are left out, chosen by angular distance"
    outcomes: ClassVar[tuple[str, ...]] = ("spare_blocks",)

    skip: Skip = "placement"
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        require(self.tolerance > 0, "tolerance", self.tolerance, "a number > 0")

    @torch.inference_mode()
    def __call__(self, model: Trunk, data: HeldOut) -> Findings:
        depth = len(model.blocks)
        angles = torch.zeros(depth + 1, depth + 1).double()
        for batch in data:
            angles += angular_distances(hidden_states(Passage(model, batch))).sum(-1).cpu()
        of_counts = [angles.diagonal(count) for count in range(1, depth + 1)]
        starts = [int(of_count.argmin()) for of_count in of_counts]  # of a nan, where there is one
        increase = Tally(data, depth)
        for batch in data:
            passage = Passage(model, batch)
            blocks, states = passage.blocks(), passage.states()
            losses = passage.losses(states[-1])
            for count, start in enumerate(starts, start=1):
                state = passage.skip(states[start], blocks[start : start + count], self.skip)
                state = passage.through(state, blocks[start + count :])
                increase.add(count - 1, batch, passage.losses(state) - losses)
        means = (increase.sums.sum(1) / data.num_targets).tolist()
        spare = next((count for count, mean in enumerate(means) if not mean < self.tolerance), depth)
        unknown = spare < depth and math.isnan(means[spare])
        title = "loss with so many blocks left out, less the loss (nats)"
        return Findings(
            scalars={"spare_blocks": math.nan if unknown else float(spare)},
            curves={
                "pruning_by_count": Curve(means, "blocks left out"),
                "pruned_from": Curve(
                    [math.nan if c[n].isnan() else n + 1.0 for c, n in zip(of_counts, starts, strict=True)],
                    "blocks left out",
                ),
            },
            by_document={"pruning_by_count": increase.sums},
            pictures=(Picture("pruning", "curves", ("pruning_by_count",), title),),
            notes=(SKIPS[self.skip],),
        )
