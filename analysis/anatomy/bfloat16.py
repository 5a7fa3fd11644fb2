"""Measures what the loss, and each prediction, become in bfloat16."""

import copy
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.anatomy.findings import Findings
from analysis.anatomy.held_out import HeldOut, Tally
from analysis.anatomy.measure import Measure
from analysis.anatomy.passage import Passage
from lightning_modules.trunk import Trunk


@dataclass(frozen=True)
class Bfloat16(Measure):
    """Measures a model in bfloat16 beside the same in fp32.

    Weights and arithmetic are bfloat16's, as a model is served (`trainer.precision=bf16-true`, not the autocast of
    bf16-mixed); the logits are then made fp32. Routers compute in fp32 under any precision.

    | name | what |
    |---|---|
    | bf16 | what the loss is more in bfloat16, nats per target |
    | bf16_kl | KL divergence of its predictions from those in fp32, KL(fp32 || bf16), nats per target |
    | bf16_same | share of targets of which both find the same one the likeliest |
    """

    name: ClassVar[str] = "bfloat16"
    about: ClassVar[str] = "loss and predictions in bfloat16 beside fp32"
    outcomes: ClassVar[tuple[str, ...]] = ("bf16", "bf16_kl", "bf16_same")

    @torch.inference_mode()
    def __call__(self, model: Trunk, data: HeldOut) -> Findings:
        narrow = copy.deepcopy(model).bfloat16()
        tally = Tally(data, len(self.outcomes))
        for batch in data:
            exact, rounded = Passage(model, batch), Passage(narrow, batch)
            reads = [each.read(each.through(each.enter(), each.blocks())) for each in (exact, rounded)]
            rows = []
            for first, second, targets in zip(*reads, exact.targets, strict=True):  # all logits would be the most
                p = _log_probabilities(model, first)
                q = _log_probabilities(narrow, second)
                losses = F.nll_loss(q, targets, reduction="none") - F.nll_loss(p, targets, reduction="none")
                same = (p.argmax(-1) == q.argmax(-1)).float().where(~losses.isnan(), math.nan)
                rows.append(torch.stack((losses, (p.exp() * (p - q)).sum(-1), same)))
            for row, values in enumerate(torch.stack(rows, dim=1)):
                tally.add(row, batch, values)
        sums = dict(zip(self.outcomes, tally.sums[:, None], strict=True))
        return Findings(
            scalars={name: float(part.sum()) / data.num_targets for name, part in sums.items()}, by_document=sums
        )


def _log_probabilities(model: Trunk, read: Tensor) -> Tensor:
    """Return [asked, rows of the head] in fp32, of what the head reads of one sample, [asked, dim]."""
    return model.logits(read[None])[0].float().log_softmax(-1)
