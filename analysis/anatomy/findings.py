"""Holds what a measure finds: numbers, and a word on how to draw them."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from analysis.anatomy.held_out import Sums


class Curve(NamedTuple):
    """A row of numbers over depth, or over anything else that is counted.

    Attributes:
        values: nan where there is none.
        over: what is counted: block, depth (0 is the embedding), blocks left out, ...
        first: what the first value stands at.
    """

    values: list[float]
    over: str = "block"
    first: int = 1

    @property
    def places(self) -> list[int]:
        """Return where each value stands."""
        return [self.first + n for n in range(len(self.values))]


class Picture(NamedTuple):
    """Asks for a picture of findings: of several runs, curves stand in one panel, and matrices each in their own.

    Attributes:
        name: of the picture's file.
        kind: curves, or a heat map.
        of: the names of the curves, or of the one matrix.
        title: with the unit.
        log: whether the values' axis is logarithmic.
    """

    name: str
    kind: Literal["curves", "heat map"]
    of: tuple[str, ...]
    title: str
    log: bool = False


@dataclass(frozen=True)
class Findings:
    """Holds what one measure says of one model.

    Attributes:
        scalars: numbers of the whole model.
        curves: rows of numbers.
        matrices: row by row; square ones over depth begin with the embedding.
        by_document: sums by document, [points, documents], of the scalar (one point) or the curve of the same name,
            whose values are these sums over documents, over the number of targets. Intervals and paired differences
            between runs are made of them.
        counts: of names in by_document whose values are over something else: the number of it, [documents].
        pictures: what is worth a picture.
        notes: sentences that a reader of the numbers must know.
    """

    scalars: dict[str, float] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    matrices: dict[str, list[list[float]]] = field(default_factory=dict)
    by_document: dict[str, Sums] = field(default_factory=dict)
    counts: dict[str, Sums] = field(default_factory=dict)
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()

    def as_plain(self) -> dict[str, Any]:
        """Return the findings as JSON has them, but what only those need who draw them or take intervals."""
        return {name: as_plain(getattr(self, name)) for name in vars(self) if name not in ("pictures", "counts")}


def as_plain(value: Any) -> Any:
    """Return a value as JSON has it: numbers to six digits, and what is no finite one as null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, tuple) and type(value) is not tuple:
        named: Any = value  # a NamedTuple
        value = named._asdict()
    if isinstance(value, dict):
        return {key: as_plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
