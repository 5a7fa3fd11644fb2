"""Measures what the head would say at every depth: the logit lens, and the tuned lens."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.anatomy.findings import Curve, Findings, Picture
from analysis.anatomy.held_out import Batch, HeldOut, Tally
from analysis.anatomy.measure import Measure
from analysis.anatomy.passage import Passage
from core.errors import require
from lightning_modules.trunk import Trunk

MAX_LOGITS = 1 << 23
"""Logits that are held at once; of a large vocabulary a batch is read a part at a time."""
CLOSE, ALIKE, TOP = 0.1, 0.2, 5
"""Thresholds of the effective depth, of the divergence and of the overlap among so many tokens: 2512.14064's code."""

Translate = Callable[[int, Tensor], Tensor]
"""Depth, what the head would read there [targets, dim] -> what it is given."""


class Reading(NamedTuple):
    """Holds what a lens sees, by document: [depths, documents].

    Attributes:
        divergence: KL(final distribution | the lens') in nats.
        overlap: the share of the final distribution's most probable tokens, or classes, that are the lens' too.
        loss: of the targets, in nats.
    """

    divergence: Tally
    overlap: Tally
    loss: Tally


def read_depths(passage: Passage) -> list[Tensor]:
    """Return what the head reads if the state of each depth is the last one, each [targets, dim]."""
    return [passage.read(state).flatten(0, 1) for state in passage.states()]


def read(model: Trunk, data: HeldOut, translate: Translate = lambda depth, x: x) -> Reading:
    """Look at every depth of a model through a lens."""
    depths = len(model.blocks) + 1
    reading = Reading(*(Tally(data, depths) for _ in range(3)))
    for batch in data:
        for depth, (divergence, overlap, loss) in enumerate(_look(model, batch, translate)):
            for tally, values in zip(reading, (divergence, overlap, loss), strict=True):
                tally.add(depth, batch, values)
    return reading


def _look(model: Trunk, batch: Batch, translate: Translate) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the divergence, overlap and loss of each target, by depth."""
    passage = Passage(model, batch)
    hidden, targets = read_depths(passage), passage.targets.flatten()
    size = max(1, MAX_LOGITS // model.head.out_features)
    parts: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in hidden]
    for first in range(0, len(targets), size):
        here = slice(first, first + size)
        final = model.logits(hidden[-1][here]).float().log_softmax(-1)
        best = final.topk(min(TOP, final.size(-1)), -1).indices
        for depth, (part, x) in enumerate(zip(parts, hidden, strict=True)):
            seen = model.logits(translate(depth, x[here])).float().log_softmax(-1)
            shared = (seen.topk(best.size(-1), -1).indices.unsqueeze(-1) == best.unsqueeze(-2)).any(-1)
            divergence = (final.exp() * (final - seen)).sum(-1)
            loss = F.nll_loss(seen, targets[here], reduction="none")
            part.append((divergence, shared.float().mean(-1).where(~divergence.isnan(), math.nan), loss))
    for part in parts:
        divergences, overlaps, losses = zip(*part, strict=True)
        yield torch.cat(divergences), torch.cat(overlaps), torch.cat(losses)


def effective_depth(divergence: list[float]) -> float:
    """Return the first depth whose divergence from the final distribution is below a tenth of the largest: 2512.14064.

    The number of blocks, where that holds of no depth before; nan, where a divergence is.
    """
    if any(map(math.isnan, divergence)):
        return math.nan
    near = (depth for depth, value in enumerate(divergence) if value < CLOSE * max(divergence) or value == 0)
    return next(near, len(divergence) - 1)


def _findings(name: str, reading: Reading, data: HeldOut, choices: int, note: str) -> Findings:
    """Return what a lens of this name has read of a head with so many rows."""
    parts = {f"{name}_{part}_by_depth": tally.sums for part, tally in zip(Reading._fields, reading, strict=True)}
    if choices <= TOP:
        del parts[f"{name}_overlap_by_depth"]  # the most probable ones are all
    means = {key: (sums.sum(1) / data.num_targets).tolist() for key, sums in parts.items()}
    by_divergence = effective_depth(means[f"{name}_divergence_by_depth"])
    scalars = {
        f"{name}_effective_depth": by_divergence,
        f"{name}_effective_share": by_divergence / (len(reading.divergence.sums) - 1),
    }
    overlap = means.get(f"{name}_overlap_by_depth")
    if overlap is not None:
        known = not any(map(math.isnan, overlap))
        first = next((n for n, value in enumerate(overlap) if value > ALIKE), len(overlap) - 1)
        scalars[f"{name}_overlap_depth"] = first if known else math.nan
    return Findings(
        scalars=scalars,
        curves={key: Curve(values, "depth", 0) for key, values in means.items()},
        by_document=parts,
        pictures=(
            Picture(f"{name}_divergence", "curves", (f"{name}_divergence_by_depth",), "KL from the final (nats)"),
            Picture(f"{name}_loss", "curves", (f"{name}_loss_by_depth",), "loss of the head at this depth (nats)"),
        ),
        notes=(note,),
    )


@dataclass(frozen=True)
class LogitLens(Measure):
    """Measures what the head says of the state at each depth, if it is given to it as the last one.

    It goes through what the placement puts before the head (`leave`: the final norm, the sum of streams), and of images
    through pooling.

    | name | what |
    |---|---|
    | lens_divergence_by_depth | KL(final distribution, that of the depth), nats, mean over targets |
    | lens_overlap_by_depth | share of the five most probable tokens, or classes, that is the same |
    | lens_loss_by_depth | loss of the head at this depth, nats per target |
    | lens_effective_depth | the first depth whose divergence is below a tenth of the largest (2512.14064) |
    | lens_effective_share | that over the number of blocks |
    | lens_overlap_depth | the first depth whose overlap is above 0.2 (2512.14064); of no more than five classes none |

    The thresholds are those of the authors' code, which takes the divergence the other way around.
    """

    name: ClassVar[str] = "lens"
    about: ClassVar[str] = "what the head says at every depth (logit lens), effective depth"
    outcomes: ClassVar[tuple[str, ...]] = ("lens_effective_depth", "lens_effective_share", "lens_overlap_depth")

    @torch.inference_mode()
    def __call__(self, model: Trunk, data: HeldOut) -> Findings:
        note = "The logit lens gives the head the state of each depth as if it were the last."
        return _findings("lens", read(model, data), data, model.head.out_features, note)


@dataclass(frozen=True)
class TunedLens(Measure):
    """Measures the same through an affine map of each depth, fitted so that the head says there what it says at last.

    x -> x + A x + b with A = 0, b = 0 at the start, by Adam on KL(final distribution | the lens') over the data's
    `fitting` part, its rate falling to 0 (2303.08112). The map stands behind what the placement puts before the head,
    so that it is the same for every placement; in the paper it stands before the final norm.

    | name | what |
    |---|---|
    | tuned_divergence_by_depth, tuned_overlap_by_depth, tuned_loss_by_depth | as of the logit lens |
    | tuned_effective_depth, tuned_effective_share, tuned_overlap_depth | likewise |

    Attributes:
        steps: of Adam.
        lr: its rate at the start.
        targets: so many in each step, evenly spaced in a batch.
    """

    name: ClassVar[str] = "tuned_lens"
    about: ClassVar[str] = "the same through an affine map that is fitted at each depth (tuned lens)"
    outcomes: ClassVar[tuple[str, ...]] = ("tuned_effective_depth", "tuned_effective_share", "tuned_overlap_depth")
    slow: ClassVar[bool] = True

    steps: int = 250
    lr: float = 2e-3
    targets: int = 512

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "an integer >= 1")
        require(self.lr > 0, "lr", self.lr, "a number > 0")
        require(self.targets >= 1, "targets", self.targets, "an integer >= 1")

    def __call__(self, model: Trunk, data: HeldOut) -> Findings:
        require(len(data.fitting) > 0, "data", "without a training part", "one to fit the lens on")
        maps = self.fit(model, data)

        def translate(depth: int, x: Tensor) -> Tensor:
            return x if depth == len(maps) else x + F.linear(x, *maps[depth])

        with torch.inference_mode():
            reading = read(model, data, translate)
        note = f"The tuned lens is fitted on {len(data.fitting)} batches of the training split, in {self.steps} steps."
        return _findings("tuned", reading, data, model.head.out_features, note)

    def fit(self, model: Trunk, data: HeldOut) -> list[tuple[Tensor, Tensor]]:
        """Return (A [dim, dim], b [dim]) of every depth but the last."""
        dim, device = model.config.dim, model.head.weight.device
        maps = [
            (
                torch.zeros(dim, dim, device=device, requires_grad=True),
                torch.zeros(dim, device=device, requires_grad=True),
            )
            for _ in model.blocks
        ]
        optimizer = torch.optim.Adam([parameter for pair in maps for parameter in pair], self.lr)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.steps)
        for step in range(self.steps):
            with torch.no_grad():
                turn, number = divmod(step, len(data.fitting))
                hidden = read_depths(Passage(model, data.fitting[number]))
                places = self._places(len(hidden[0]), turn).to(device)
                final = model.logits(hidden[-1][places]).float().log_softmax(-1)
            for pair, x in zip(maps, hidden[:-1], strict=True):  # a depth at a time: so much is held of the logits
                x = x[places]
                seen = model.logits(x + F.linear(x, *pair)).float().log_softmax(-1)
                loss = F.kl_div(seen, final, reduction="batchmean", log_target=True)
                for parameter, gradient in zip(pair, torch.autograd.grad(loss, pair), strict=True):
                    parameter.grad = gradient
            optimizer.step()
            decay.step()
        return [(matrix.detach(), offset.detach()) for matrix, offset in maps]

    def _places(self, count: int, turn: int) -> Tensor:
        """Return evenly spaced places, other ones in each turn through the batches."""
        every = max(1, -(-count // self.targets))
        return torch.arange(turn % every, count, every)
