"""Reads the commands out of Markdown: blocks of ```bash and ```sh, and indented lines that begin with a program."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support.runs import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAM = re.compile(
    r"(?:[A-Z_]+=\S* )*(?:python3?|pip|make|tensorboard|torchrun|docker|bash|git|source|export|tar|sed|chromium|sbatch"
    r"|srun|accelerate|mkdocs|curl|apt-get|eval|for)\s"
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENT = "    "


class Command(NamedTuple):
    """One command line.

    Attributes:
        page: where it stands, relative to the repository.
        line: its number there, from 1.
        text: as it stands, on one line, without comment.
    """

    page: str
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        """As a shell would split it, without variables that are set for it."""
        words = shlex.split(self.text)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        return words

    @property
    def arguments(self) -> list[str]:
        """What follows FILE.py or `-m MODULE`, whatever starts it."""
        words = self.words
        first = next(n for n, word in enumerate(words, start=1) if word.endswith(".py") or words[n - 2] == "-m")
        return words[first:]


def commands(page: Path) -> Iterator[Command]:
    """All of a page, in order."""
    text, name = page.read_text(), page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name
    found = []
    for block in BLOCK.finditer(text):
        if block[1] in ("bash", "sh", "shell", "console"):
            found += _lines(block[2], text.count("\n", 0, block.start(2)) + 1)
    rest = BLOCK.sub(lambda block: "\n" * block[0].count("\n"), text)  # so that line numbers stay
    lines = [line.strip() if line.startswith(INDENT) else "" for line in rest.split("\n")]
    found += [(number, line) for number, line in _lines("\n".join(lines), 1) if PROGRAM.match(line)]
    yield from (Command(name, number, line) for number, line in sorted(found))


def _lines(text: str, first: int) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not empty, with what goes on after a backslash, without comments."""
    joined = re.sub(r"\\\n\s*", "\0", text).split("\n")
    for line in joined:
        command = re.sub(r"^#.*$|\s#\s.*$", "", line.replace("\0", "")).removeprefix("$ ").strip()
        if command:
            yield first, command
        first += 1 + line.count("\0")
