"""Collections of labelled images, which can be asked for any of them by number."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from core.errors import UserError, one_line
from datamodules.index import CorpusError

Pixels = npt.NDArray[np.uint8]
"""One image, [height, width, channels]."""
Labels = npt.NDArray[np.int64]
ORIENTATION = 0x0112
"""EXIF's tag of how a picture is to be turned to stand upright."""
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""That are read, whatever a file is called: of PIL's others one starts Ghostscript, and hardly any is looked after."""


class ImageSource(Protocol):
    """Picklable, so that data-loader workers get one.

    Attributes:
        labels: the class of each image, [images].
    """

    labels: Labels

    def name(self, index: int) -> str:
        """Return what an image is called in a message."""
        ...

    def image(self, index: int) -> Pixels:
        """Return the pixels of an image.

        Raises:
            CorpusError: it cannot be read; says which.
        """
        ...


class ImageArrays:
    """Images that are in memory already.

    Args:
        images: uint8 [images, height, width, channels].
        labels: the class of each.
    """

    def __init__(self, images: Pixels, labels: Labels) -> None:
        self.images, self.labels = images, labels

    def name(self, index: int) -> str:
        return f"image {index}"

    def image(self, index: int) -> Pixels:
        pixels: Pixels = self.images[index]
        return pixels


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Read an image by PIL, and say in a line what is wrong with it.

    Args:
        name: what it is called in a message.

    Raises:
        UserError: PIL is not installed.
        CorpusError: it is no image, damaged, or has more pixels than PIL takes to be safe.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError("PIL is not installed: pip install -r requirements-vision.txt") from error
    bombs = Image.DecompressionBombError, Image.DecompressionBombWarning
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            yield
    except (OSError, ValueError, SyntaxError, AttributeError, *bombs) as error:
        raise CorpusError(f"{name} cannot be read as an image: {one_line(error)}") from error


def decode(file: Any, name: str, mode: str | None = None) -> Pixels:
    """Return the pixels of an image's file, of one of FORMATS, gray or in colours, as PIL reads it.

    Args:
        file: its path, or an open file.
        name: what it is called in a message.
        mode: of PIL, that the image is converted to before; None: the file's.

    Raises:
        UserError, CorpusError: see `reading`.
    """
    with reading(name):
        from PIL import Image, UnidentifiedImageError

        try:
            opened = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError as error:
            raise ValueError(f"its content is none of {', '.join(FORMATS)}, or damaged") from error
        with opened as image:
            return from_pil(image if mode in (None, image.mode) else image.convert(mode))


def from_pil(image: Any) -> Pixels:
    """Return the pixels of an image of PIL's, [height, width, 1 or 3].

    It is turned as its EXIF orientation says, what is transparent lies on white, and of 16 bits the upper 8 are taken.

    Raises:
        ValueError: its pixels are integers of 32 bits or fractions, of which nobody says what white is.
    """
    from PIL import Image, ImageOps

    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits (PIL's mode {image.mode}), where 8 or 16 are expected")
    if image.mode.startswith("I;16"):  # convert would make all but the darkest 256 of 65,536 levels white
        levels = np.asarray(image)
        upper = (levels >> 8).astype(np.uint8)
        transparent = image.info.get("transparency")  # a level of 16 bits, of PNG
        if transparent is not None:
            upper[levels == transparent] = 255
        return upper[..., None]
    gray = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.asarray(image.convert("L" if gray else "RGB"))
    return pixels[..., None] if gray else pixels
