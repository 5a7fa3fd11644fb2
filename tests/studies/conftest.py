"""What tests of studies share."""

from pathlib import Path

import pytest

from core.atomic_write import write_whole
from studies import figures


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of a moment: what is drawn is not looked at."""
    monkeypatch.setattr(figures, "_save", lambda figure, output: figures.pyplot().close(figure) or write_dot(output))


def write_dot(output: Path) -> None:
    write_whole(output, lambda unfinished: unfinished.write_bytes(b"\x89PNG"))
