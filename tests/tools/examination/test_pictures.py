"""The pictures of a report: what is written in them can be read."""

from pathlib import Path
from typing import Literal

import pytest

from analysis.anatomy.bootstrap import Interval
from analysis.anatomy.findings import Curve, Findings, Picture
from tests.support.pictures import Written
from tools.examination.pictures import draw


@pytest.mark.parametrize("values", [[3.0, 5.4], [0.02, 0.9], [1e-6, 1e3], [0.5, 0.52], [-3.0, 5.0]], ids=str)
def test_a_logarithmic_scale_has_numbers_and_no_formulas(
    values: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within one power of ten, too, where matplotlib writes at the small ticks."""
    written = Written(monkeypatch)
    draw(
        Picture("x", "curves", ("x",), "x", log=True),
        {"run": Findings(curves={"x": Curve(values)})},
        {},
        tmp_path / "x.png",
    )
    assert not [text for text in written.texts if "$" in text]
    numbers = [float(text) for text in written.texts if text.lstrip("-").replace("e-", "").replace(".", "").isdigit()]
    assert sum(min(values) <= number <= max(values) for number in numbers if number not in (1.0, 2.0)) >= 1


@pytest.mark.parametrize("kind", ["curves", "heat map"])
def test_a_long_heading_is_not_cut(
    kind: Literal["curves", "heat map"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Written(monkeypatch)
    found = Findings(curves={"x": Curve([1.0, 2.0])}, matrices={"x": [[1.0, 2.0], [3.0, 4.0]]})
    heading = (
        "loss without the expert, less the loss: mixture (y) and expert (x), from 0, and what else there is to say"
    )
    draw(Picture("x", kind, ("x",), heading), {"run": found}, {}, tmp_path / "x.png")
    assert heading in [" ".join(text.split()) for text in written.texts]
    assert not written.cut


def test_intervals_are_drawn_beside_their_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of figures that hold the same curve, the one with intervals has a band."""
    import matplotlib.axes

    bands: list[tuple[list[float], ...]] = []
    monkeypatch.setattr(matplotlib.axes.Axes, "fill_between", lambda self, *places, **options: bands.append(places))
    found = {"a": Findings(curves={"x": Curve([2.0, 3.0])}), "b": Findings(curves={"x": Curve([4.0, 5.0])})}
    intervals = {"b": {"x": [Interval(4.0, 3.5, 4.5), Interval(5.0, 4.0, 6.0)]}}
    draw(Picture("x", "curves", ("x",), "x"), found, intervals, tmp_path / "x.png")
    assert bands == [([1, 2], [3.5, 4.0], [4.5, 6.0])]
