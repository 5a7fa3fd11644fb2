"""Measures how often the routers of two models choose the same experts for the same token."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from analysis.anatomy.findings import Curve, Findings, Picture
from analysis.anatomy.held_out import HeldOut, Tally
from analysis.anatomy.measure import Comparison, other_positions
from analysis.anatomy.routing import NO_MIXTURE, chosen_experts, count, mixture_note
from lightning_modules.trunk import Trunk


@dataclass(frozen=True)
class RoutingAgreement(Comparison):
    """Measures the stability of routing between two checkpoints: of one run, whose experts are the same ones.

    Experts of two runs that began from other weights have nothing but their number in common, and agree by chance.

    | name | what |
    |---|---|
    | routing_agreement | share of a position's top-k experts that both choose; mean over positions and mixtures |
    | routing_chance | the same of two models that choose each expert as often as these, whatever the position |
    | routing_agreement_by_mixture, routing_chance_by_mixture | the same of each mixture |
    """

    name: ClassVar[str] = "routing_agreement"
    about: ClassVar[str] = "how often the routers of the first run and of another choose the same experts"
    outcomes: ClassVar[tuple[str, ...]] = ("routing_agreement",)

    def lacks(self, first: Trunk, second: Trunk) -> str | None:
        """Say that there is no mixture, or that the two have other ones, or take other positions."""
        if not first.mixtures() or not second.mixtures():
            return NO_MIXTURE
        ours, theirs = ((list(m.mixtures()), m.config.moe.num_experts, m.config.moe.top_k) for m in (first, second))
        for what, mine, other in zip(("mixtures in blocks", "experts", "experts a token"), ours, theirs, strict=True):
            if mine != other:
                return f"its {what} are {other}, those of the first are {mine}"
        return other_positions(first, second)

    @torch.inference_mode()
    def __call__(self, first: Trunk, second: Trunk, data: HeldOut) -> Findings:
        mixtures, moe = len(first.mixtures()), first.config.moe
        tally = Tally(data, mixtures, positions=True)
        loads = torch.zeros(2, mixtures, moe.num_experts, dtype=torch.float64)
        for batch in data:
            pairs = zip(chosen_experts(first, batch), chosen_experts(second, batch), strict=True)
            for number, (ours, theirs) in enumerate(pairs):
                shared = (ours[:, :, None] == theirs[:, None, :]).any(-1).double()
                tally.add(number, batch, shared.where((ours >= 0) & (theirs >= 0), math.nan).mean(-1))
                for load, chosen in zip(loads[:, number], (ours, theirs), strict=True):
                    load += count(chosen, moe.num_experts)
        shares = loads / data.num_positions  # how likely an expert is among a token's
        chance = ((shares[0] * shares[1]).sum(-1) / moe.top_k).tolist()
        sums = {"routing_agreement": tally.sums.mean(0, keepdims=True), "routing_agreement_by_mixture": tally.sums}
        means = {name: (part.sum(1) / data.num_positions).tolist() for name, part in sums.items()}
        names = ("routing_agreement_by_mixture", "routing_chance_by_mixture")
        return Findings(
            scalars={"routing_agreement": means["routing_agreement"][0], "routing_chance": sum(chance) / mixtures},
            curves={names[0]: Curve(means[names[0]], "mixture"), names[1]: Curve(chance, "mixture")},
            by_document=sums,
            counts=dict.fromkeys(sums, data.positions_by_document),
            pictures=(Picture("routing_agreement", "curves", names, "share of a token's experts that both choose"),),
            notes=mixture_note(first),
        )
