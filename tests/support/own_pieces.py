"""The files that docs/own_pieces.md shows, as a user would put them into a folder."""

import re
import sys
from pathlib import Path

from tests.support.runs import ROOT


def pieces() -> dict[str, str]:
    """Each file's name, from its first line, with its text."""
    blocks = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", page("own_pieces"), re.MULTILINE | re.DOTALL)
    return dict(blocks)


def page(name: str) -> str:
    return (ROOT / f"docs/{name}.md").read_text()


def write_pieces(folder: Path) -> None:
    for name, text in pieces().items():
        (folder / name).write_text(text)


def forget_pieces(*more: str) -> None:
    """Let the next import read a folder of its own: another test's may have them in this process."""
    for name in (*(name.removesuffix(".py") for name in pieces()), *more):
        sys.modules.pop(name, None)
