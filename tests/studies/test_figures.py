"""The pictures of a study: what is written in them can be read."""

from pathlib import Path

import pytest

from studies.figures import draw_decay, draw_depth
from studies.grid import Study
from studies.record import FINISHED, Record
from studies.tables import grids
from tests.support.pictures import Written


def test_logarithmic_scales_have_numbers_and_no_formulas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Written(monkeypatch)
    draw_decay({"a": ([300.0, 2.0, 1.0], [250.0, 3.0, 1.0])}, tmp_path / "decay.png")
    study = Study(
        "mine", "laptop", "Which?", "little", {"model.norm": {"rmsnorm": [], "layernorm": []}}, None, (0,), ()
    )
    by_block = {
        "gradients/block_{}/all": {"0": {"1": 0.03, "2": 0.5}},
        "signal/block_{}/variance": {"0": {"1": 4.0, "2": 5.0}},
    }
    records = [
        Record(run.name, dict(run.point), 0, list(run.overrides), FINISHED, "", by_block=by_block)
        for run in study.runs()
    ]
    draw_depth(study, grids(study, records).every, (), tmp_path / "depth.png")
    assert not [text for text in written.texts if "$" in text]
    assert {"100", "0.1", "4"} <= set(written.texts)
    assert not written.cut
