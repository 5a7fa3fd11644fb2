"""Checks where a tool draws to before anything is computed, and writes the picture whole."""

from pathlib import Path
from typing import Any

from core.atomic_write import unfinished_of
from core.errors import require, writing

ENDINGS = (".png", ".svg", ".pdf")


def check_picture(output: Path | None) -> None:
    """Refuse a name that no picture can have; None passes.

    Raises:
        ConfigError: it does not end as a picture, or is a folder's or too long for the file system.
    """
    if output is None:
        return
    valid = f"a name that ends in one of {', '.join(ENDINGS)}"
    require(output.suffix in ENDINGS and "\0" not in str(output), "output", str(output), valid)
    with writing("output", output):
        require(not output.is_dir(), "output", str(output), "the name of a file: this is a folder")


def save_picture(figure: Any, output: Path, dpi: int) -> None:
    """Write a figure of matplotlib's, whole or not at all, and make the folder for it.

    Raises:
        ConfigError: the file system refuses it.
    """
    unfinished = unfinished_of(output)
    with writing("output", output):
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(unfinished, dpi=dpi, format=output.suffix[1:])
        unfinished.replace(output)
