"""Measures what the loss becomes where an expert is left out."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from analysis.anatomy.findings import Curve, Findings, Picture
from analysis.anatomy.held_out import HeldOut, Tally
from analysis.anatomy.measure import Measure
from analysis.anatomy.passage import Passage
from analysis.anatomy.routing import NO_MIXTURE, mixture_note, without_expert
from lightning_modules.trunk import Trunk


@dataclass(frozen=True)
class ExpertDrop(Measure):
    """Measures the loss where the router of a mixture cannot choose one of its experts.

    What would have gone to it goes to the next best, with weights over the experts that are left. Mixtures are counted
    from the first.

    | name | what |
    |---|---|
    | expert_drop | what the loss is more, nats per target; mean over experts and mixtures |
    | expert_drop_by_mixture | the same of each mixture |
    | expert_drop_most_by_mixture | of its expert that is missed most |
    | expert_drop_by_expert | of each expert, mixture by mixture |
    """

    name: ClassVar[str] = "expert_drop"
    about: ClassVar[str] = "loss without each expert"
    outcomes: ClassVar[tuple[str, ...]] = ("expert_drop",)

    def lacks(self, model: Trunk) -> str | None:
        """Say that there is no mixture, or that its router has to choose every expert."""
        if not model.mixtures():
            return NO_MIXTURE
        moe = model.config.moe
        return None if moe.top_k < moe.num_experts else f"each token goes to all of model.moe.num_experts={moe.top_k}"

    @torch.inference_mode()
    def __call__(self, model: Trunk, data: HeldOut) -> Findings:
        mixtures, experts = model.mixtures(), model.config.moe.num_experts
        tally = Tally(data, len(mixtures) * experts)
        for batch in data:
            passage = Passage(model, batch)
            blocks, states = passage.blocks(), passage.states()
            losses = passage.losses(states[-1])
            for row, (number, mixture) in enumerate(mixtures.items()):
                for expert in range(experts):
                    with without_expert(mixture, expert):
                        state = passage.through(states[number - 1], blocks[number - 1 :])
                    tally.add(row * experts + expert, batch, passage.losses(state) - losses)
        sums = tally.sums.reshape(len(mixtures), experts, -1)
        drops = sums.sum(-1) / data.num_targets
        return Findings(
            scalars={"expert_drop": float(drops.mean())},
            curves={
                "expert_drop_by_mixture": Curve(drops.mean(1).tolist(), "mixture"),
                "expert_drop_most_by_mixture": Curve(drops.max(1).tolist(), "mixture"),
            },
            matrices={"expert_drop_by_expert": drops.tolist()},
            by_document={
                "expert_drop": sums.mean((0, 1))[None],
                "expert_drop_by_mixture": sums.mean(1),
            },
            pictures=(
                Picture(
                    "expert_drop_by_expert",
                    "heat map",
                    ("expert_drop_by_expert",),
                    "loss without the expert, less the loss: mixture (y) and expert (x), from 0",
                ),
            ),
            notes=mixture_note(model),
        )
