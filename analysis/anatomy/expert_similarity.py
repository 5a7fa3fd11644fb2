"""Measures how like each other the experts of a mixture are, in their weights and in what they put out."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.anatomy.findings import Curve, Findings, Picture
from analysis.anatomy.forward import run
from analysis.anatomy.held_out import HeldOut
from analysis.anatomy.measure import Measure
from analysis.anatomy.routing import NO_MIXTURE, mixture_note
from analysis.anatomy.similarity import linear_cka, sampled
from core.errors import require
from lightning_modules.layers.experts import ExpertMLP
from lightning_modules.layers.moe import MoE
from lightning_modules.trunk import Trunk
from spannorm.precision import without_autocast


@dataclass(frozen=True)
class ExpertSimilarity(Measure):
    """Measures the similarity of all pairs of experts of a mixture. Mixtures are counted from the first.

    | name | what |
    |---|---|
    | expert_cosine | cosine of two experts' weights, all three matrices as one vector; mean over pairs and mixtures |
    | expert_cka | linear CKA (1905.00414) of what two experts put out for the same tokens, whoever they are routed to |
    | expert_cosine_by_mixture, expert_cka_by_mixture | the same of each mixture |
    | expert_cosine_NUMBER, expert_cka_NUMBER | the same of each pair, of the mixture of that number |

    The cosine goes by the places of hidden features: two experts that differ in their order alone do the same and have
    a cosine near 0, as do any two that began from different weights.

    Attributes:
        positions: tokens that CKA is taken over, evenly spaced; memory grows with the square of them, and the CKA of
            outputs that have nothing in common with the width of the model over their number.
    """

    name: ClassVar[str] = "expert_similarity"
    about: ClassVar[str] = "similarity of experts: cosine of weights, linear CKA of outputs on the same tokens"
    outcomes: ClassVar[tuple[str, ...]] = ("expert_cosine", "expert_cka")

    positions: int = 1024

    def __post_init__(self) -> None:
        require(self.positions >= 2, "positions", self.positions, "an integer >= 2")

    def lacks(self, model: Trunk) -> str | None:
        """Say that there are no two experts, or that those of megablocks do not take tokens without a router."""
        mixtures = model.mixtures()
        if not mixtures:
            return NO_MIXTURE
        if any(not isinstance(mixture.experts.mlp, ExpertMLP) for mixture in mixtures.values()):
            return "experts of model.moe.backend=megablocks take no tokens but by their router; auto takes others"
        return None if model.config.moe.num_experts > 1 else "it has one expert, model.moe.num_experts=1"

    @torch.inference_mode()
    def __call__(self, model: Trunk, data: HeldOut) -> Findings:
        mixtures = list(model.mixtures().values())
        inputs = _inputs(model, data, self.positions)
        found = {
            "expert_cosine": [weight_cosines(mixture) for mixture in mixtures],
            "expert_cka": [
                linear_cka(outputs, outputs)
                for outputs in (expert_outputs(mixture, x) for mixture, x in zip(mixtures, inputs, strict=True))
            ],
        }
        means = {name: [_mean_of_pairs(matrix) for matrix in of_each] for name, of_each in found.items()}
        shown = sorted({1, len(mixtures)})
        titles = {"expert_cosine": "cosine of experts' weights", "expert_cka": "linear CKA of experts' outputs"}
        return Findings(
            scalars={name: sum(values) / len(values) for name, values in means.items()},
            curves={f"{name}_by_mixture": Curve(values, "mixture") for name, values in means.items()},
            matrices={
                f"{name}_{number}": matrix.tolist()
                for name, of_each in found.items()
                for number, matrix in enumerate(of_each, start=1)
            },
            pictures=(
                *(Picture(name, "curves", (f"{name}_by_mixture",), title) for name, title in titles.items()),
                *(
                    Picture(f"expert_cka_{n}", "heat map", (f"expert_cka_{n}",), f"{titles['expert_cka']}, mixture {n}")
                    for n in shown
                ),
            ),
            notes=mixture_note(model),
        )


def weight_cosines(mixture: MoE) -> Tensor:
    """Return the cosine of each pair of experts' weights, [experts, experts]; autocast does not round them."""
    mlp = mixture.experts.mlp
    parts = [weight.unflatten(0, (-1, mlp.hidden_dim)).flatten(1) for weight in (mlp.w1, mlp.v1, mlp.w2)]
    units = F.normalize(torch.cat(parts, dim=1).float(), dim=1)
    with without_autocast(units):
        return units @ units.mT


def expert_outputs(mixture: MoE, x: Tensor) -> list[Tensor]:
    """Return what each expert puts out for all tokens x [tokens, dim], without the router's weights."""
    outputs = []
    for expert in range(mixture.config.moe.num_experts):
        counts = x.new_zeros(mixture.config.moe.num_experts)
        counts[expert] = len(x)
        outputs.append(mixture.experts.mlp(x, counts))
    return outputs


def _inputs(model: Trunk, data: HeldOut, positions: int) -> list[Tensor]:
    """Return what each mixture reads of evenly spaced tokens, each [tokens, dim]."""
    mixtures = model.mixtures().values()
    parts: list[list[Tensor]] = [[] for _ in mixtures]
    for batch, places in sampled(data, positions):
        seen: list[Tensor] = []

        def keep(module: Any, inputs: tuple[Any, ...], seen: list[Tensor] = seen) -> None:
            seen.append(inputs[0].flatten(0, -2))

        with ExitStack() as hooks:
            for mixture in mixtures:
                hooks.callback(mixture.register_forward_pre_hook(keep).remove)
            run(model, batch)
        for part, x in zip(parts, seen, strict=True):
            part.append(x[places.to(x.device)])
    return [torch.cat(part) for part in parts]


def _mean_of_pairs(matrix: Tensor) -> float:
    """Return the mean over pairs of different experts."""
    return float(matrix[tuple(torch.triu_indices(len(matrix), len(matrix), 1))].mean())
