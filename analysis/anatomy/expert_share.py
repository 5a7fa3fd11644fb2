"""Measures which expert takes what, by depth and, where positions are tokens, by kind of token."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from analysis.anatomy.findings import Curve, Findings, Picture
from analysis.anatomy.held_out import Batch, HeldOut
from analysis.anatomy.measure import Measure
from analysis.anatomy.routing import NO_MIXTURE, chosen_experts, count, mixture_note
from analysis.anatomy.token_kinds import KINDS, token_kinds
from lightning_modules.trunk import Trunk

NO_KINDS = "Positions stand for no tokens of a text, whose kinds could be told apart."
NOT_DRAWN = ("expert_share_mixed", "expert_share_other")


@dataclass(frozen=True)
class ExpertShare(Measure):
    """Measures how positions are shared out among the experts, by the kind of the token that the router reads.

    Kinds are letters, digits, whitespace, punctuation, mixed and other: analysis/anatomy/token_kinds.py. Of what is no
    text there are none, and nothing is said of them. Mixtures are counted from the first.

    | name | what |
    |---|---|
    | busiest_expert | the busiest expert's share over an equal one; mean over mixtures |
    | kind_information | mutual information of a token's kind and its expert, nats; mean over mixtures; of a text |
    | busiest_expert_by_mixture, kind_information_by_mixture | the same of each mixture |
    | expert_share | each expert's share of the choices, mixture by mixture; sums to 1 |
    | expert_share_KIND | the same of the choices for tokens of one kind; of a text |

    A position with several experts counts once for each.
    """

    name: ClassVar[str] = "expert_share"
    about: ClassVar[str] = "which expert takes what, by depth and by kind of token"
    outcomes: ClassVar[tuple[str, ...]] = ("busiest_expert", "kind_information")

    def lacks(self, model: Trunk) -> str | None:
        """Say that there is no mixture, where there is none."""
        return None if model.mixtures() else NO_MIXTURE

    @torch.inference_mode()
    def __call__(self, model: Trunk, data: HeldOut) -> Findings:
        experts = model.config.moe.num_experts
        counts = torch.zeros(len(model.mixtures()), len(KINDS), experts, dtype=torch.float64)
        for batch in data:
            kinds = _kinds(model, batch, data.tokenizer)
            for mixture, chosen in zip(counts, chosen_experts(model, batch), strict=True):
                pairs = torch.where(chosen < 0, chosen, kinds[:, None] * experts + chosen)
                mixture += count(pairs, mixture.numel()).view(mixture.shape)
        busiest = (experts * _shares(counts.sum(1)).amax(-1)).tolist()
        information = mutual_information(counts).tolist()
        shares = {"expert_share": _shares(counts.sum(1))}
        found = {"busiest_expert": busiest}
        lines: tuple[Picture, ...] = ()
        notes: tuple[str, ...] = (NO_KINDS,)
        if data.tokenizer is not None:
            shares |= {
                f"expert_share_{kind}": _shares(counts[:, number])
                for number, kind in enumerate(KINDS)
                if counts[:, number].any()
            }
            found["kind_information"] = information
            curve = ("kind_information_by_mixture",)
            lines, notes = (Picture("kind_information", "curves", curve, "kind and expert (nats)"),), ()
        heat_maps = (
            Picture(name, "heat map", (name,), f"{name.replace('_', ' ')}: mixture (y) and expert (x), from 0")
            for name in shares
            if name not in NOT_DRAWN
        )
        return Findings(
            scalars={name: sum(values) / len(values) for name, values in found.items()},
            curves={f"{name}_by_mixture": Curve(values, "mixture") for name, values in found.items()},
            matrices={name: share.tolist() for name, share in shares.items()},
            pictures=(*lines, *heat_maps),
            notes=(*notes, *mixture_note(model)),
        )


def _kinds(model: Trunk, batch: Batch, tokenizer: Any) -> Tensor:
    """Return the place in KINDS of what the router reads at each position, [batch x positions]; without tokens 0."""
    tokens = model.tokens(batch.rows)
    if tokens is None or tokenizer is None:
        return torch.zeros(batch.num_positions, dtype=torch.int64)
    return token_kinds(tokens, tokenizer).flatten()


def mutual_information(counts: Tensor) -> Tensor:
    """Return what kind and expert say of each other, in nats, [mixtures], of counts [mixtures, kinds, experts]."""
    joint = counts / counts.sum((1, 2), keepdim=True)
    apart = joint.sum(1, keepdim=True) * joint.sum(2, keepdim=True)
    return (torch.xlogy(joint, joint) - torch.xlogy(joint, apart)).sum((1, 2))


def _shares(counts: Tensor) -> Tensor:
    return counts / counts.sum(-1, keepdim=True)
