"""Measures features that are far larger than the others, and attention that rests on the first token."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from analysis.anatomy.findings import Curve, Findings, Picture
from analysis.anatomy.forward import run
from analysis.anatomy.held_out import Batch, HeldOut, Tally
from analysis.anatomy.measure import Measure
from analysis.states import BlockView, token_kurtosis, watching
from core.errors import require
from lightning_modules.trunk import Trunk

SINK_HEAD = 0.3
"""The share of attention on the first token from which a head counts as a sink (2410.10781, section 3.2)."""
NAMED = 5
"""As many of the massive dimensions are named in the notes."""
SEES_ALL = "Sinks are not measured: they are of causal attention, whose queries all see the first token."
SINKS = (
    Picture("sinks", "curves", ("sink_by_block",), "attention's weight on the first token"),
    Picture(
        "sinks_of_heads",
        "heat map",
        ("sink_by_head",),
        "attention's weight on the first token: block (y) and head (x), from 0",
    ),
)


@dataclass(frozen=True)
class Outliers(Measure):
    """Measures massive activations (2402.17762), attention sinks (2309.17453) and heavy tails, block by block.

    The stream is what the placement hands on after a block, before a final norm; several streams stand side by side,
    and the dimensions of the second count on from those of the first.

    | name | what |
    |---|---|
    | activation_ratio | largest magnitude of the stream after a block, over the median of magnitudes; of all blocks |
    | persistent_dimensions | how many dimensions are massive after at least half of the blocks |
    | kurtosis | E x^4 / (E x^2)^2 over a position's features, mean over positions and blocks; 3 for Gaussian ones |
    | sink | attention's weight on the first token that a query sees, mean over queries, heads and blocks |
    | sink_heads | share of all heads whose weight on it is above 0.3 (2410.10781) |
    | sink_uniform | the sink of attention that looks at all tokens alike |
    | activation_ratio_by_block, kurtosis_by_block, sink_by_block | the same of each block |
    | activation_max_by_block | largest magnitude |
    | activation_dimension_by_block | the dimension, counted from 0, that has it |
    | massive_dimensions_by_block | how many have at least once `ratio` times the median, the mean of batches' medians |
    | sink_by_head | the sink of each head, block by block |

    Sinks are those of causal attention. The first token is the document's where attention keeps documents apart, and
    else the sequence's. It sees nothing but itself, and counts as 0 in all means of sinks.

    Attributes:
        ratio: how many times the median a massive activation is. 2402.17762 asks for about 1000, and for a magnitude
            of more than 100 besides, which is left out: the scale of the stream is the placement's own.
    """

    name: ClassVar[str] = "outliers"
    about: ClassVar[str] = "largest activations and where they persist, attention sinks, kurtosis"
    outcomes: ClassVar[tuple[str, ...]] = (
        "activation_ratio",
        "persistent_dimensions",
        "kurtosis",
        "sink",
        "sink_heads",
    )

    ratio: float = 1000.0

    def __post_init__(self) -> None:
        require(self.ratio > 1, "ratio", self.ratio, "a number > 1")

    @torch.inference_mode()
    def __call__(self, model: Trunk, data: HeldOut) -> Findings:
        depth, heads = len(model.blocks), model.config.num_heads
        largest = [torch.zeros(())] * depth  # of each dimension
        medians, tails = torch.zeros(depth), Tally(data, depth, positions=True)
        sinks, uniform = Tally(data, depth * heads, positions=True), 0.0
        for batch in data:
            share = batch.num_positions / data.num_positions
            if model.config.causal:
                places = _places(batch)
                uniform += share * float(torch.where(places > 0, 1 / (places + 1), 0.0).mean())

            def see(view: BlockView, batch: Batch = batch, share: float = share) -> None:
                index, after = view.number - 1, view.after.abs().float().cpu()
                largest[index] = torch.maximum(largest[index], after.flatten(0, 1).amax(0))
                medians[index] += share * after.median()
                tails.add(index, batch, token_kurtosis(view.after))
                if model.config.causal:
                    for head, weights in enumerate(first_token_weights(view, batch).unbind(1)):
                        sinks.add(index * heads + head, batch, weights)

            with watching(model, see):
                run(model, batch)
        found = _activations(torch.stack(largest), medians, self.ratio, model.config.dim)
        by_document = {"kurtosis": tails.sums.mean(0, keepdims=True), "kurtosis_by_block": tails.sums}
        scalars, matrices, notes = {}, {}, (*found.notes, *(() if model.config.causal else (SEES_ALL,)))
        if model.config.causal:
            of_heads = sinks.sums.reshape(depth, heads, -1)
            on_first = of_heads.sum(-1) / data.num_positions
            by_document |= {"sink": sinks.sums.mean(0, keepdims=True), "sink_by_block": of_heads.mean(1)}
            matrices["sink_by_head"] = on_first.tolist()
            sink_heads = float(np.where(np.isnan(on_first), np.nan, on_first > SINK_HEAD).mean())
            scalars = {"sink_heads": sink_heads, "sink_uniform": uniform}
        means = {name: (sums.sum(1) / data.num_positions).tolist() for name, sums in by_document.items()}
        of_model = {name: values[0] for name, values in means.items() if not name.endswith("_by_block")}
        return Findings(
            scalars={**found.scalars, **of_model, **scalars},
            curves={
                **found.curves,
                **{name: Curve(values) for name, values in means.items() if name.endswith("_by_block")},
            },
            matrices=matrices,
            by_document=by_document,
            counts=dict.fromkeys(by_document, data.positions_by_document),
            pictures=(
                Picture("activations", "curves", ("activation_ratio_by_block",), "largest activation / median", True),
                Picture("kurtosis", "curves", ("kurtosis_by_block",), "kurtosis of a position's features", True),
                *(SINKS if model.config.causal else ()),
            ),
            notes=notes,
        )


def first_token_weights(view: BlockView, batch: Batch) -> Tensor:
    """Return each head's weight on the first token that a query sees, [batch, heads, seq]; the first's own is 0."""
    places, rows = _places(batch), []
    index = torch.arange(places.size(1))
    for row, place in enumerate(places):  # the weights of a whole batch would be its largest tensor
        cos, sin = (table[row] if table.dim() == 4 else table for table in view.rope)
        logits = view.block.attn.logits(view.attn_input[row : row + 1], (cos, sin))[0]
        first = index - place
        if "positions" in batch.rows:  # queries see their own document
            other = first[:, None] != first[None, :]
            logits = logits.masked_fill(other.to(logits.device), -math.inf)
        weights = logits.softmax(-1).cpu()[:, index, first]
        rows.append(weights * (place > 0))
    return torch.stack(rows)


def _places(batch: Batch) -> Tensor:
    """Return how many tokens a query sees before itself, [batch, seq]."""
    known = batch.rows.get("positions")
    return torch.arange(batch.documents.size(1)).expand_as(batch.documents) if known is None else known


def _activations(largest: Tensor, medians: Tensor, ratio: float, dim: int) -> Findings:
    """Return what there is to say of activations.

    Args:
        largest: of each block and dimension, [blocks, features].
        medians: of each block.
        ratio: from which on times the median an activation is massive.
        dim: features of one stream.
    """
    times = largest / medians[:, None]
    known = ~(largest.isnan().any(1) | medians.isnan())
    massive = times >= ratio
    blocks = massive.sum(0)
    persistent = blocks * 2 >= len(massive)
    named = sorted(blocks.nonzero().flatten().tolist(), key=lambda d: (-blocks[d], -times[:, d].amax()))[:NAMED]
    notes = [
        f"Dimension {d % dim}{f' of stream {d // dim + 1}' if largest.size(1) > dim else ''} is massive after blocks "
        f"{_ranges((massive[:, d].nonzero().flatten() + 1).tolist())}: up to {largest[:, d].amax():.3g}, "
        f"{times[:, d].amax():.3g} times the median."
        for d in named
    ]
    return Findings(
        scalars={
            "activation_ratio": float(times.amax()),
            "persistent_dimensions": float(persistent.sum()) if known.all() else math.nan,
        },
        curves={
            "activation_max_by_block": Curve(largest.amax(1).tolist()),
            "activation_ratio_by_block": Curve(times.amax(1).tolist()),
            "activation_dimension_by_block": Curve(largest.argmax(1).double().where(known, math.nan).tolist()),
            "massive_dimensions_by_block": Curve(massive.sum(1).double().where(known, math.nan).tolist()),
        },
        notes=tuple(notes),
    )


def _ranges(numbers: list[int]) -> str:
    """Return ascending numbers as in `1-3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)
