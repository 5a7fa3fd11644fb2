"""Measures what the loss becomes where weights and activations have few bits."""

import re
from dataclasses import dataclass
from typing import ClassVar

import torch

from analysis.anatomy.fake_quantization import fake_quantization
from analysis.anatomy.findings import Findings
from analysis.anatomy.forward import target_losses
from analysis.anatomy.held_out import HeldOut, Tally
from analysis.anatomy.measure import Measure
from core.errors import require
from lightning_modules.trunk import Trunk

SCHEME = re.compile(r"w([2-9]|1[0-6])a([2-9]|1[0-6])")


@dataclass(frozen=True)
class Quantization(Measure):
    """Measures the loss under fake quantization: post-training, by rounding to nearest alone.

    | name | what |
    |---|---|
    | w8a8, w4a16, w4a4 | what the loss is more with weights, and activations, of so many bits |

    16 bits stand for what is not rounded at all. Weights have one scale an output channel, activations one a token, and
    both are symmetric: analysis/anatomy/fake_quantization.py has the formula, and what is left as it is. Experts are
    covered as attention and FFN are. Products add up what was rounded in full precision, as those of integers do.

    Attributes:
        schemes: bits of weights and activations.
        ends: whether embedding and head are quantized too.
    """

    name: ClassVar[str] = "quantization"
    about: ClassVar[str] = "loss with weights and activations of 8 and 4 bits"
    outcomes: ClassVar[tuple[str, ...]] = ("w8a8", "w4a16", "w4a4")

    schemes: tuple[str, ...] = ("w8a8", "w4a16", "w4a4")
    ends: bool = False

    def __post_init__(self) -> None:
        valid = "schemes as w4a8: bits of weights and of activations, from 2 to 16 each"
        require(bool(self.schemes), "schemes", "[]", valid)
        for scheme in self.schemes:
            require(SCHEME.fullmatch(scheme) is not None, "schemes", scheme, valid)

    def lacks(self, model: Trunk) -> str | None:
        """Say that experts of megablocks cannot be reached: they do not let hooks in between their products."""
        if any(mixture.backend.name == "megablocks" for mixture in model.mixtures().values()):
            return "experts of model.moe.backend=megablocks cannot be quantized; auto takes others"
        return None

    @torch.inference_mode()
    def __call__(self, model: Trunk, data: HeldOut) -> Findings:
        tally = Tally(data, len(self.schemes))
        for batch in data:
            exact = target_losses(model, batch)
            for row, scheme in enumerate(self.schemes):
                weight_bits, activation_bits = (None if n == "16" else int(n) for n in scheme[1:].split("a"))
                with fake_quantization(model, weight_bits, activation_bits, self.ends):
                    tally.add(row, batch, target_losses(model, batch) - exact)
        sums = dict(zip(self.schemes, tally.sums[:, None], strict=True))
        return Findings(
            scalars={scheme: float(part.sum()) / data.num_targets for scheme, part in sums.items()}, by_document=sums
        )
