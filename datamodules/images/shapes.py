"""Scenes of simple shapes: a task that is made, not found, and that wants comparing and counting."""

from typing import Any

import numpy as np
import numpy.typing as npt

from core.errors import require
from datamodules.endless_datamodule import EndlessDataModule
from datamodules.images.image_datamodule import image_encoding
from datamodules.samples import Numbers, Rows

KINDS = {
    "block": ("###", "###", "###"),
    "cross": ("..#..", "..#..", "#####", "..#..", "..#.."),
    "saltire": ("#...#", ".#.#.", "..#..", ".#.#.", "#...#"),
}
"""The kinds of shapes, drawn; each covers nine pixels, so that brightness does not tell them apart."""
CELLS = 3
"""The scene is a grid of so many cells a side, each of which holds one shape or none."""
CELL = 8
"""Pixels of a cell's side; the outermost ones are the frame's."""
FloatArray = npt.NDArray[np.float32]
SHAPES = {kind: np.array([[mark == "#" for mark in row] for row in rows], np.float32) for kind, rows in KINDS.items()}
NUM_SHAPES, MOST = 8, 3
"""Shapes in every scene, and how many of them may be like the framed one: the classes are 0 to MOST."""
VALIDATION_KEY, NUM_VAL_SAMPLES = 1, 1 << 20  # training is key 0 of the seed


def draw_shape(kind: str, rng: np.random.Generator) -> FloatArray:
    """Return a cell with a shape in it, turned by a multiple of 90 degrees, anywhere off the border, [CELL, CELL]."""
    shape = np.rot90(SHAPES[kind], int(rng.integers(4)))
    side = len(shape)
    top, left = rng.integers(1, CELL - side, 2).tolist()
    cell = np.zeros((CELL, CELL), np.float32)
    cell[top : top + side, left : left + side] = shape
    return cell


def draw_scene(rng: np.random.Generator, clutter: int) -> tuple[FloatArray, int]:
    """Draw one scene.

    Args:
        rng: draws all of it.
        clutter: lines that lie over the scene.

    Returns:
        (brightness [CELLS x CELL, CELLS x CELL], from 0 to 1; how many other shapes are of the framed one's kind).
    """
    size = CELLS * CELL
    scene = np.zeros((size, size), np.float32)
    names = list(KINDS)
    label = int(rng.integers(MOST + 1))
    framed = int(rng.integers(len(names)))
    others = framed + rng.integers(1, len(names), NUM_SHAPES - 1 - label)
    kinds = [names[kind % len(names)] for kind in [framed] * (label + 1) + others.tolist()]
    for number, (cell, kind) in enumerate(zip(rng.permutation(CELLS**2).tolist(), kinds, strict=False)):
        row, column = divmod(cell, CELLS)
        drawn = draw_shape(kind, rng) * np.float32(rng.uniform(0.5, 0.9))
        if number == 0:
            drawn[[0, -1], :] = drawn[:, [0, -1]] = 1.0
        scene[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = drawn
    for _ in range(clutter):
        (top, left), angle, length = rng.uniform(0, size, 2), rng.uniform(0, np.pi), rng.uniform(6, 16)
        steps = np.arange(0, length, 0.5)
        rows, columns = (top + steps * np.sin(angle)).astype(int), (left + steps * np.cos(angle)).astype(int)
        seen = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
        scene[rows[seen], columns[seen]] = rng.uniform(0.3, 0.7)
    noisy = scene + rng.normal(0, 0.05, scene.shape)
    return np.clip(noisy, 0, 1).astype(np.float32), label


class SceneSamples:
    """Scene n is drawn with a generator of its own, made of the seed and n."""

    def __init__(self, clutter: int, seed: int, key: int, mean: float, std: float) -> None:
        self.clutter, self.seed, self.key, self.mean, self.std = clutter, seed, key, mean, std

    def read(self, numbers: Numbers) -> Rows:
        """Return {"images": fp32 [samples, 1, size, size], "labels": int64 [samples]}."""
        scenes = [
            draw_scene(np.random.default_rng([self.seed, self.key, number]), self.clutter)
            for number in numbers.tolist()
        ]
        images = np.stack([scene for scene, _ in scenes])[:, None]
        return {
            "images": (images - np.float32(self.mean)) / np.float32(self.std),
            "labels": np.array([label for _, label in scenes]),
        }


class Shapes(EndlessDataModule):
    """Scenes of 24 x 24 pixels (data=shapes): one shape is framed; how many of the others are of its kind, 0 to 3?

    Kinds are to be told apart locally, the framed one's is to be found, the others are to be compared with it, and the
    equal ones counted: what one block cannot do at once. Every scene has as many shapes, of as many pixels each, so
    that its brightness says nothing. No scene comes twice, so nothing can be learned by heart.

    Args:
        batch_size, val_batches, num_workers, seed: see EndlessDataModule.
        clutter: lines that lie over each scene.

    Raises:
        ConfigError: a value out of range.
    """

    image_size, num_channels, num_classes = CELLS * CELL, 1, MOST + 1
    mean, std = 0.157, 0.298  # of scenes with one line

    def __init__(
        self, batch_size: int, val_batches: int = 16, num_workers: int = 0, seed: int = 0, clutter: int = 1
    ) -> None:
        super().__init__(batch_size, val_batches, num_workers, seed)
        require(0 <= clutter <= 100, "data.clutter", clutter, "an integer from 0 to 100")
        self.clutter = clutter
        self.save_hyperparameters()

    @property
    def encoding(self) -> dict[str, Any]:
        return image_encoding(self)

    def samples(self, split: str) -> SceneSamples:
        seed, key = (self.seed, 0) if split == "train" else (0, VALIDATION_KEY)
        return SceneSamples(self.clutter, seed, key, self.mean, self.std)

    @property
    def num_val_samples(self) -> int:
        return NUM_VAL_SAMPLES

    @property
    def stream_identity(self) -> dict[str, Any]:
        return {**super().stream_identity, "clutter": self.clutter}

    def unigram_loss(self) -> float | None:
        return float(np.log(self.num_classes))
