"""A report of figures by hand: what stands where, of two models of which one is deeper."""

import json
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from analysis.anatomy.findings import Curve, Findings, Picture
from tests.support.anatomy import make_text
from tests.support.pictures import Written
from tools.examination.examine import Examined
from tools.examination.report import Report, write


def examined(name: str, loss: float, losses: list[float], left_out: dict[str, str]) -> Examined:
    """Of a run with these losses of the head by depth, the same for every token."""
    tokens = make_text().targets_by_document
    found = Findings(
        scalars={"loss": loss, "late_drop": 0.25},
        curves={"lens_loss_by_depth": Curve(losses, "depth", 0)},
        by_document={"loss": loss * tokens[None], "lens_loss_by_depth": np.outer(losses, tokens)},
        pictures=(Picture("lens_loss", "curves", ("lens_loss_by_depth",), "loss of the head"),),
    )
    path = Path("runs") / name / "checkpoints/last.ckpt"
    shape = ("prenorm", len(losses) - 1, 8, "dense", 100, False)
    return Examined(Path("runs") / name, path, 7, *shape, {"lens": found}, left_out)


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    Written(monkeypatch)
    runs = [examined("a", 3.0, [5.0, 4.0, 3.0], {}), examined("b", 2.5, [6.0, 2.5], {"expert_drop": "it has none"})]
    return write(Report(make_text(), runs, "somewhere", [[], []]), tmp_path / "report").parent


def test_places_that_a_model_does_not_have_are_blank(report: Path) -> None:
    text = (report / "report.md").read_text()
    assert "| depth | runs/a | runs/b |" in text
    assert "| 0 | 5 | 6 |\n| 1 | 4 | 2.5 |\n| 2 | 3 | - |\n" in text
    assert "| `loss` | 3 | 2.5 |\n| `late_drop` | 0.25 | 0.25 |\n" in text
    assert "- expert_drop, runs/b: it has none" in text


def test_the_others_are_held_against_the_first(report: Path) -> None:
    """Where they have as many points as it."""
    text = (report / "report.md").read_text()
    assert "Less that of runs/a, over the same documents:\n\n|  | runs/b |\n|---|---|\n| `loss` | -0.5 |\n\n" in text
    content = json.loads((report / "report.json").read_text())
    ((label, differences),) = content["differences"]["lens"].items()
    assert label == "runs/b"
    assert {name: [each["value"] for each in of_one] for name, of_one in differences.items()} == {"loss": [-0.5]}


def test_a_curve_s_step_is_its_place(report: Path) -> None:
    events = EventAccumulator(str(report / "tensorboard/runs_a"), size_guidance={"scalars": 0}).Reload()
    curve = events.Scalars("lens/lens_loss_by_depth")
    assert [(event.step, event.value) for event in curve] == [(0, 5.0), (1, 4.0), (2, 3.0)]
    (loss,) = events.Scalars("lens/loss")
    assert (loss.step, loss.value) == (7, 3.0)
