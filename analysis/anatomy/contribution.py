"""Measures what a block adds beside what it gets."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from analysis.anatomy.findings import Curve, Findings, Picture
from analysis.anatomy.held_out import HeldOut
from analysis.anatomy.measure import Measure
from analysis.anatomy.passage import Passage
from lightning_modules.trunk import Trunk


@dataclass(frozen=True)
class Contribution(Measure):
    """Measures the size and the direction of what a block adds, beside its skip.

    The skip is what the placement makes of the state with sublayers that put out zeros; what the block adds is what
    comes out of it less the skip. Under PreNorm the skip is the state itself, and these are the relative contribution
    and the cosine of 2505.13898 for whole blocks.

    | name | what |
    |---|---|
    | contribution_by_block | norm of what is added over the skip's, mean over positions |
    | direction_by_block | cosine of the two: below 0 something is erased, at 0 it is new, above 0 amplified |

    As scalars late_contribution is the mean over the later half of the blocks over that of the earlier half.
    """

    name: ClassVar[str] = "contribution"
    about: ClassVar[str] = "what a block adds beside its skip: ratio of norms, cosine"
    outcomes: ClassVar[tuple[str, ...]] = ("late_contribution",)

    @torch.inference_mode()
    def __call__(self, model: Trunk, data: HeldOut) -> Findings:
        ratios, directions = torch.zeros(len(model.blocks)).double(), torch.zeros(len(model.blocks)).double()
        for batch in data:
            passage = Passage(model, batch)
            state = passage.enter()
            for number, block in enumerate(passage.blocks()):
                skip = block.placement.hidden(passage.skip(state, [block])).float()
                state = passage.through(state, [block])
                added = block.placement.hidden(state).float() - skip
                ratios[number] += (added.norm(dim=-1) / skip.norm(dim=-1)).sum().cpu()
                directions[number] += F.cosine_similarity(added, skip, dim=-1).sum().cpu()
        ratio, direction = (ratios / data.num_positions).tolist(), (directions / data.num_positions).tolist()
        half = len(ratio) // 2
        scalars = {}
        if half:
            early, late = sum(ratio[:half]) / half, sum(ratio[-half:]) / half
            scalars["late_contribution"] = late / early if early else float("nan")
        return Findings(
            scalars=scalars,
            curves={"contribution_by_block": Curve(ratio), "direction_by_block": Curve(direction)},
            pictures=(
                Picture("contribution", "curves", ("contribution_by_block",), "norm of what is added over the skip's"),
                Picture("direction", "curves", ("direction_by_block",), "cosine of what is added with the skip"),
            ),
        )
