"""Draws quantities over depth and time into one picture, fast enough for a run to do it at each validation.

Pillow draws it in some milliseconds where matplotlib takes most of a second.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

MAX_COLUMNS = 256
"""Times that are kept of a quantity; beyond it every second one is forgotten."""
PLOT, BAR, PROFILE = 330, 10, 130  # pixels of width: heat map, its colours, the profile over depth
LEFT, GAP, LABEL, RIGHT, TITLE, BOTTOM = 36, 6, 72, 12, 26, 28  # of margins
FONT = 16
"""Of letters, in pixels: TensorBoard shows a picture in a card of 340 pixels, which is 0.6 of its width."""
HEIGHT = 128
"""Pixels that a heat map is high, about: a whole number of them for each block."""
VIRIDIS = np.array(
    [
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ]
)
"""Colours from the smallest to the largest value; between them it is linear."""
LEAST_FACTOR, LEAST_SHARE = 1.25, 0.1
"""The colours span at least this factor of a quantity on a logarithmic scale, and this share of its size on a linear
one: what is flat looks flat."""
NO_NUMBER = (220, 30, 30)
INK, FAINT = (40, 40, 40), (170, 170, 170)


@dataclass
class History:
    """Keeps one quantity of each block, over the steps of a run.

    Attributes:
        blocks: their numbers, ascending.
        steps: optimizer steps, counted from 1, ascending.
        columns: the values at each of them, float32 [blocks].
    """

    blocks: list[int]
    steps: list[int] = field(default_factory=list)
    columns: list[npt.NDArray[np.float32]] = field(default_factory=list)

    def add(self, step: int, values: Sequence[float]) -> None:
        """Take in what was measured at a step; what is known of it and of later ones, before a rollback, is dropped."""
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.columns.pop()
        if len(self.steps) >= MAX_COLUMNS:
            del self.steps[1::2], self.columns[1::2]
        self.steps.append(step)
        self.columns.append(np.asarray(values, dtype=np.float64).astype(np.float32))


def draw(panels: Mapping[str, History]) -> Image.Image:
    """Return the picture, in RGB, one panel a quantity, below each other.

    Of each there are a heat map, a row for each block, the first at the top, over the steps; its colours, on a
    logarithmic scale where nothing is below 0, with zeros at its lower end; and the profile over depth, now in black
    against the first in grey. A quantity that hardly differs over depth and time has the colours of the middle.
    Red: no finite number.

    Args:
        panels: at least one, by title; each with at least one step.
    """
    heights = [_cell(history) * len(history.blocks) for history in panels.values()]
    width = LEFT + PLOT + GAP + BAR + LABEL + PROFILE + RIGHT
    row_height = TITLE + max(heights) + BOTTOM
    image = Image.new("RGB", (width, row_height * len(panels)), "white")
    for index, (title, history) in enumerate(panels.items()):
        _panel(image, (0, index * row_height), title, history)
    return image


def _cell(history: History) -> int:
    """Return how many pixels a block is high."""
    return max(2, HEIGHT // len(history.blocks))


def _panel(image: Image.Image, corner: tuple[int, int], title: str, history: History) -> None:
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(FONT)
    values = np.stack(history.columns, axis=1).astype(np.float64)  # [blocks, steps]
    finite = values[np.isfinite(values)]
    logarithmic = bool(finite.size and finite.min() >= 0 and finite.max() > 0)
    has_zeros = bool(logarithmic and finite.min() == 0)
    if logarithmic:
        floor = _floor(finite)
        scaled, finite = (np.log(np.maximum(part, floor)) for part in (values, finite))
    else:
        scaled = values
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if not has_zeros:
        low, high = _widened(low, high, math.log(LEAST_FACTOR) if logarithmic else LEAST_SHARE * max(-low, high))
    share = (scaled - low) / (high - low) if high > low else np.where(np.isfinite(scaled), 0.5, np.nan)

    cell, (left, top) = _cell(history), (corner[0] + LEFT, corner[1] + TITLE)
    height = cell * len(history.blocks)
    pixels = _colours(share)[:, _column_of_pixel(history.steps)].repeat(cell, axis=0)
    image.paste(Image.fromarray(pixels), (left, top))
    scale = _colours(np.linspace(1, 0, height)[:, None]).repeat(BAR, axis=1)
    image.paste(Image.fromarray(scale), (left + PLOT + GAP, top))

    pen.text((left, corner[1] + 4), f"{title}{', log colour' if logarithmic else ''}", INK, font)
    for row, number in _labelled(history.blocks):
        y = top + (row + 0.5) * cell
        pen.text((left - 4, y), str(number), INK, font, anchor="rm")
    pen.text((left, top + height + 3), f"step {history.steps[0]}", INK, font)
    pen.text((left + PLOT, top + height + 3), str(history.steps[-1]), INK, font, anchor="ra")
    for value, y, anchor in ((high, top, "la"), (low, top + height, "ld")):
        text = "0" if value == low and has_zeros else f"{math.exp(value) if logarithmic else value:.2g}"
        pen.text((left + PLOT + GAP + BAR + 3, y), text, INK, font, anchor=anchor)

    x = left + PLOT + GAP + BAR + LABEL
    pen.rectangle((x, top, x + PROFILE, top + height - 1), outline=FAINT)
    for column, colour in ((0, FAINT), (-1, INK)):
        points = [
            (x + 3 + float(part) * (PROFILE - 6), top + (row + 0.5) * cell)
            for row, part in enumerate(share[:, column])
            if math.isfinite(part)
        ]
        pen.line(points, fill=colour, width=2)
        for point in points if len(points) < 2 * HEIGHT // 8 else ():
            pen.ellipse((point[0] - 2, point[1] - 2, point[0] + 2, point[1] + 2), fill=colour)
    pen.text((x, top + height + 3), "now; grey: first", INK, font)


def _widened(low: float, high: float, least: float) -> tuple[float, float]:
    """Return a span around the same middle, at least so wide."""
    margin = max(0.0, least - (high - low)) / 2
    return low - margin, high + margin


def _floor(values: npt.NDArray[np.float64]) -> float:
    """Return the smallest that a logarithmic scale shows: where there are zeros, some way below all others."""
    smallest, largest = float(values[values > 0].min()), float(values.max())
    return smallest if values.min() > 0 else smallest / max(2.0, (largest / smallest) ** 0.2)


def _column_of_pixel(steps: Sequence[int]) -> npt.NDArray[np.intp]:
    """Return which column each pixel shows, [PLOT]: the last that was measured by then; a single one fills all."""
    ends = [*steps[1:], steps[-1] + (steps[-1] - steps[0]) / max(len(steps) - 1, 1) if len(steps) > 1 else steps[0] + 1]
    at = np.linspace(steps[0], ends[-1], PLOT, endpoint=False)
    return np.searchsorted(np.asarray(steps), at, side="right") - 1


def _colours(share: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Return [..., 3] for values from 0 to 1."""
    places = np.linspace(0, 1, len(VIRIDIS))
    known = np.nan_to_num(np.clip(share, 0, 1))
    colours = np.stack([np.interp(known, places, channel) for channel in VIRIDIS.T], axis=-1)
    return np.where(np.isfinite(share)[..., None], colours, NO_NUMBER).round().astype(np.uint8)


def _labelled(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (row, number) of the blocks whose number has room beside them, the first among them."""
    every = math.ceil(12 / max(2, HEIGHT // len(blocks)))
    yield from ((row, number) for row, number in enumerate(blocks) if row % every == 0)
