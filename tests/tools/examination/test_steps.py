"""What a run folder of a stranger's may hold of its steps: it is drawn, or refused in a line."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from core.untrusted import Untrusted
from studies import figures
from tools.examination import steps
from tools.examination.steps import FOLDER, draw_drops, draw_scalars, kept_of


def write(folder: Path, step: int, values: Any, scalars: Any = None) -> None:
    path = folder / FOLDER / f"{step}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"scalars": scalars or {"loss": 1.0}, "curves": {"drop_by_block": {"values": values}}}
    path.write_text(json.dumps({"step": step, "findings": {"layer_drop": found}}))


@pytest.mark.parametrize(
    ("values", "scalars", "message"),
    [
        ([1.0, 2.0, 3.0], {}, r"1\.json cannot be read: drop_by_block has values of 2 and 3 blocks$"),
        ([], {}, r"1\.json cannot be read: drop_by_block has values of 0 and 2 blocks$"),
        ([1.0, math.inf], {}, r"1\.json cannot be read: .*values\.1=inf: Input should be a finite number"),
        ([1.0, 2.0], {"loss": math.nan}, r"1\.json cannot be read: .*loss=nan: Input should be a finite number"),
        ([1.0, 2.0], {f"s{n}": 1.0 for n in range(64)}, "steps has 65 scalars; the bound is 64, and READ_LIMITS=10"),
        ([1.0, 2.0], {f"s{n}": 1.0 for n in range(400)}, r"1\.json cannot be read: .*at most 64 items"),
    ],
    ids=["ragged", "empty", "infinite", "no number", "names", "many names"],
)
def test_what_cannot_be_drawn_is_refused(values: Any, scalars: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path, 0, [1.0, 2.0])
    write(tmp_path, 1, values, scalars)
    with pytest.raises(Untrusted, match=message) as refusal:
        kept_of(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_model_of_one_block_is_read(tmp_path: Path) -> None:
    """Its swaps are an empty curve; a run whose every curve is empty is no run."""
    write(tmp_path, 0, [1.0])
    path = tmp_path / FOLDER / "0.json"
    content = json.loads(path.read_text())
    curves = content["findings"]["layer_drop"]["curves"]
    path.write_text(
        json.dumps({**content, "findings": {"layer_drop": {"curves": {**curves, "swap_by_block": {"values": []}}}}})
    )
    assert len(kept_of(tmp_path)) == 1
    write(tmp_path, 0, [])
    with pytest.raises(Untrusted, match="drop_by_block has values of 0 blocks"):
        kept_of(tmp_path)


def test_all_files_together_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(3):
        write(tmp_path, step, [1.0, 2.0])
    size = sum(path.stat().st_size for path in (tmp_path / FOLDER).iterdir())
    monkeypatch.setattr(steps, "MAX_BYTES", size)
    assert len(kept_of(tmp_path)) == 3
    monkeypatch.setattr(steps, "MAX_BYTES", size - 1)
    with pytest.raises(
        Untrusted, match=re.escape(f"steps has more than {size - 1:,} bytes; the bound is {size - 1:,}")
    ):
        kept_of(tmp_path)


@pytest.mark.filterwarnings("error")
def test_what_no_scale_holds_is_left_blank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 0, [0.5, 1e308], {"loss": -1e308})
    write(tmp_path, 1, [0.25, None], {"loss": None})
    drawn: list[Any] = []
    monkeypatch.setattr(steps, "save_picture", lambda figure, output, dpi: (figure.canvas.draw(), drawn.append(figure)))
    monkeypatch.setattr(figures.pyplot(), "close", lambda figure: None)
    kept = {"one": kept_of(tmp_path)}
    draw_scalars(kept, tmp_path / "scalars.png")
    draw_drops(kept, tmp_path / "drops.png")
    image = drawn[1].axes[0].images[0].get_array()
    assert image.filled(-1).tolist() == [[0.5, 0.25], [-1, -1]]
