"""Measures how sharply the loss bends: the Hessian's ends, and the largest eigenvalue that Adam sees."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F

from analysis.anatomy.adam_state import AdamState
from analysis.anatomy.findings import Findings
from analysis.anatomy.forward import on_its_device
from analysis.anatomy.held_out import HeldOut
from analysis.anatomy.measure import Measure
from analysis.curvature import Vector, differentiable_twice, extreme_eigenvalues, hessian_product, obstacle
from core.checkpoint import load
from core.errors import require
from core.open_run import OpenRun
from lightning_modules.trunk import Trunk


@dataclass(frozen=True)
class Sharpness(Measure):
    """Measures the curvature of the loss on a few samples, of the mean in nats per target, without auxiliary losses.

    | name | what |
    |---|---|
    | hessian_top, hessian_bottom | the largest and the smallest eigenvalue of the Hessian in all parameters |
    | preconditioned_sharpness | that of P^-1 H, with P what Adam divides its next step by (2207.14484) |
    | stability_threshold | that at which Adam's steps at the checkpoint's learning rate lose their hold: 38 / lr |
    | peak_stability_threshold | the same at the schedule's peak, where the rate is higher |

    By Lanczos' iteration (analysis/curvature.py), whose estimates approach the ends from inside. A few samples bend
    more sharply than all data do together: compare values of the same number of them. 38 is (2 + 2 beta1) /
    (1 - beta1) with beta1 = 0.9. Where groups of parameters have learning rates of their own, P has them in it.

    Attributes:
        sequences: so many samples, or all where there are fewer, all side by side: the graph of a backward pass
            through the backward pass is kept.
        iterations: products with each matrix; close eigenvalues want more.
        adam: second moments and rate; None: nothing preconditioned is measured.
    """

    name: ClassVar[str] = "sharpness"
    about: ClassVar[str] = "the Hessian's largest eigenvalue, and preconditioned sharpness beside 38 / lr"
    outcomes: ClassVar[tuple[str, ...]] = ("hessian_top", "preconditioned_sharpness")

    sequences: int = 4
    iterations: int = 20
    adam: AdamState | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("sequences", "iterations"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")

    def of_run(self, run: OpenRun) -> Self:
        """Return the measure with the second moments that the run's checkpoint has kept, where it has."""
        return replace(self, adam=AdamState.of(load(run.checkpoint), run.module.model))

    def lacks(self, model: Trunk) -> str | None:
        """Say what keeps the loss from being differentiated twice."""
        return obstacle(model)

    def __call__(self, model: Trunk, data: HeldOut) -> Findings:
        batch = data.beginning(self.sequences)
        rows, targets = on_its_device(model, batch.rows), batch.targets.to(model.head.weight.device)
        number, sample = batch.num_samples, data.task.sample
        notes = [f"Of the first {number} held-out {sample}s." if number > 1 else f"Of one held-out {sample}."]
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        parameters = list(named.values())
        with differentiable_twice(model):
            state, _ = model.through_blocks(*model.entry(rows))
            logits = model.logits(model.read(state, rows))
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            multiply = hessian_product(loss, parameters)
            bottom, top = extreme_eigenvalues(multiply, parameters, self.iterations)
            scalars = {"hessian_top": float(top), "hessian_bottom": float(bottom)}
            if self.adam is None:
                notes.append("Without the second moments of Adam nothing is preconditioned.")
                return Findings(scalars, notes=tuple(notes))
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
            scales = list(self.adam.scales(dict(zip(named, gradients, strict=True))).values())

            def between(vector: Vector) -> Vector:  # P^(-1/2) H P^(-1/2): symmetric, of the same eigenvalues
                product = multiply([part * scale for part, scale in zip(vector, scales, strict=True)])
                return [part * scale for part, scale in zip(product, scales, strict=True)]

            _, preconditioned = extreme_eigenvalues(between, parameters, self.iterations)
        scalars["preconditioned_sharpness"] = float(preconditioned)
        rates = {"stability_threshold": self.adam.lr, "peak_stability_threshold": self.adam.peak_lr}
        scalars |= {name: self.adam.threshold(lr) for name, lr in rates.items() if lr > 0}
        return Findings(scalars, notes=tuple(notes))
