"""What stands in a picture, seen while it is saved."""

from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
from matplotlib.text import Text


class Written:
    """Collects the texts of every figure that is saved, in whose place stands an empty file.

    Attributes:
        texts: all of them, those at the axes' ticks too.
        cut: headings that do not fit into their figure.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[str] = []
        self.cut: list[str] = []

        def look(figure: Any, path: Path, **options: Any) -> None:
            figure.canvas.draw()
            self.texts += [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
            for heading in (*figure.texts, *(axes.title for axes in figure.axes)):
                box = heading.get_window_extent()
                if heading.get_text() and not (box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1):
                    self.cut.append(heading.get_text())
            path.touch()

        monkeypatch.setattr(matplotlib.figure.Figure, "savefig", look)
