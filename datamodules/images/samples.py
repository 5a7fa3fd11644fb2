"""The samples of a collection of images: shuffled, augmented, cut to size and normalized, by number alone."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from datamodules.images.sources import ImageSource, Pixels
from datamodules.index import CorpusError
from datamodules.order import sample_indices
from datamodules.samples import Numbers, Rows

Augment = Callable[[Pixels], Pixels]
MAX_RATIO = 100
"""Of an image's sides: scaled by the shorter one, a line of a million pixels would fill the memory."""


class ImageSamples:
    """The images of a split, each epoch in another order.

    Augmentation draws from torch's generator, which is seeded for each sample by its number and set back afterwards:
    what a sample looks like depends on nothing else, whatever the number of processes, and wherever a run was resumed.

    Args:
        source: the images.
        image_size: height and width that they get.
        num_channels: 1 or 3.
        mean, std: of each channel, for pixels from 0 to 1, to normalize with.
        seed: of the order and of the augmentation.
        augment: changes the pixels before they are cut to size; None: nothing does.

    Attributes:
        together: how many are read at once.
    """

    together = 1

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        num_channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        augment: Augment | None = None,
    ) -> None:
        self.source, self.image_size, self.num_channels = source, image_size, num_channels
        self.mean: npt.NDArray[np.float32] = np.asarray(mean, np.float32)[:, None, None]
        self.std: npt.NDArray[np.float32] = np.asarray(std, np.float32)[:, None, None]
        self.seed, self.augment = seed, augment

    def read(self, numbers: Numbers) -> Rows:
        """Return {"images": fp32 [samples, channels, size, size], "labels": int64 [samples]}."""
        indices = sample_indices(numbers, len(self.source.labels), self.seed)
        images = [self._read(*pair) for pair in zip(indices.tolist(), numbers.tolist(), strict=True)]
        return {"images": np.stack(images), "labels": self.source.labels[indices]}

    def _read(self, index: int, number: int) -> npt.NDArray[np.float32]:
        pixels = self.source.image(index)
        try:
            return self._prepared(pixels, number)
        except CorpusError as error:
            raise CorpusError(f"{self.source.name(index)}: {error}") from error

    def _prepared(self, pixels: Pixels, number: int) -> npt.NDArray[np.float32]:
        if self.augment is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(np.random.SeedSequence([self.seed, number]).generate_state(1, np.uint64)[0] >> 1))
                pixels = self.augment(pixels)
        pixels = cut_to_size(with_channels(pixels, self.num_channels), self.image_size)
        brightness = np.moveaxis(pixels, -1, 0).astype(np.float32) / np.float32(255)
        return np.asarray((brightness - self.mean) / self.std, np.float32)


def with_channels(pixels: Pixels, num_channels: int) -> Pixels:
    """Return an image with so many channels: 3 of gray are the same, and 1 of colours is their luma (ITU-R 601)."""
    have = pixels.shape[-1]
    if have == num_channels:
        return pixels
    if have == 1:
        return np.repeat(pixels, num_channels, axis=-1)
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    return np.clip(np.rint(luma), 0, 255).astype(np.uint8)[..., None]


def cut_to_size(pixels: Pixels, size: int) -> Pixels:
    """Return the middle of an image, [size, size, channels], whose shorter side is then `size`, by PIL's bicubic.

    Raises:
        CorpusError: the longer side is more than MAX_RATIO times the shorter one.
    """
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return pixels
    if max(height, width) > MAX_RATIO * min(height, width):
        reason = f"its longer side is more than {MAX_RATIO} times the shorter one"
        raise CorpusError(f"an image of {width} x {height} pixels cannot be scaled by its shorter side: {reason}")
    from PIL import Image

    shorter = min(height, width)
    height, width = (int(size * side / shorter) for side in (height, width))  # as torchvision and transformers round
    resized = [
        np.asarray(Image.fromarray(channel).resize((width, height), Image.Resampling.BICUBIC))
        for channel in np.moveaxis(pixels, -1, 0)
    ]
    top, left = (height - size) // 2, (width - size) // 2
    return np.stack(resized, axis=-1)[top : top + size, left : left + size]
