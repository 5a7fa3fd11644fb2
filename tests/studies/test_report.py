"""A report's numbers, recomputed with numpy from the stored records; what is missing or failed is shown as such."""

import re
from pathlib import Path

import numpy as np
import pytest
from scipy.special import stdtr

from core import cli
from studies.grid import Planned, Study
from studies.record import BROKEN, FINISHED, NO_NUMBER, ROSE, UNLEARNED, Record, judge
from studies.report import main, write
from studies.tables import cells, compare, tuned

RATES = {rate: [f"optim.lr={rate}"] for rate in ("1e-3", "3e-3", "1e-2")}
PLACEMENTS = {name: [f"model.placement={name}"] for name in ("prenorm", "spannorm", "postnorm")}
STUDY = Study(
    "rates", "laptop", "Which?", "little", {"model.placement": PLACEMENTS, "optim.lr": RATES}, "prenorm", (0, 1, 2), ()
)
LOSSES = {
    ("prenorm", "1e-3"): (2.10, 2.13, 2.08),
    ("prenorm", "3e-3"): (2.01, 2.06, 1.99),
    ("prenorm", "1e-2"): (2.2, 2.3, 2.25),
    ("spannorm", "1e-3"): (2.00, 2.02, 1.97),
    ("spannorm", "3e-3"): (1.94, 1.98, 1.95),
    ("spannorm", "1e-2"): (1.90, None, 1.91),
    ("postnorm", "1e-3"): (None, None, None),
    ("postnorm", "3e-3"): (2.4, 2.5),
    ("postnorm", "1e-2"): (),
}
"""By seed; None: diverged; a missing entry: no record."""


def record(run: Planned, loss: float | None) -> Record:
    steps = [0, 5]
    return Record(
        **{"name": run.name, "point": dict(run.point), "seed": run.seed, "overrides": list(run.overrides)},
        status=FINISHED if loss is not None else NO_NUMBER,
        folder=f"runs/studies/rates/laptop/{run.name}",
        val_loss=loss,
        bigram_loss=2.6,
        seconds=10.0,
        train_loss=(steps, [3.0, loss or float("nan")]),
        by_block={"signal/block_{}/variance": {"0": {"1": 1.0, "2": 2.0}, "5": {"1": 1.5, "2": 2.5}}},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records, and the report on them."""
    tmp_path = tmp_path_factory.mktemp("records")
    STUDY.save(tmp_path / "study.yaml")
    for run in STUDY.runs():
        losses = LOSSES[tuple(run.point.values())]
        if run.seed < len(losses):
            record(run, losses[run.seed]).save(tmp_path / f"{run.name}.json")
    (tmp_path / "postnorm_1e-2_seed0").mkdir()  # begun
    (tmp_path / "postnorm_1e-2_seed1.json").write_text('{"name": "postnorm_1e-2_se')  # cut off
    assert write(tmp_path) == tmp_path / "report.md"
    return tmp_path


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """The first table under a heading: {first cell: others}, links without their target."""
    section = text.split(f"## {heading}")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    split = [
        [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", cell.strip()) for cell in line.strip("|").split("|")] for line in lines[2:]
    ]
    return {cells[0]: cells[1:] for cells in split}


def test_the_loss_table_is_mean_and_deviation_over_seeds(folder: Path) -> None:
    found = rows((folder / "report.md").read_text(), "Final validation loss")
    for (placement, rate), losses in LOSSES.items():
        cell = found[placement][list(RATES).index(rate)]
        if len(losses) == 3 and None not in losses:
            assert cell == f"{np.mean(losses):.3f} ± {np.std(losses, ddof=1):.3f} (3)"
    assert found["spannorm"][2] == "failed: 1 no number, 2 finished", "the survivors' mean would hide the failure"
    assert found["postnorm"] == ["failed: 3 no number", "2.450 ± 0.071 (2); 1 missing", "3 missing"]


def test_what_is_missing_or_half_written_is_said(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert (
        "27 runs are planned (model.placement x optim.lr x 3 seeds); 23 have ended, of which training failed in 4."
        in text
    )
    assert "**4 are missing.** Half written, and left out: postnorm_1e-2_seed0, postnorm_1e-2_seed1." in text


def test_each_is_tuned_on_its_own_and_only_where_nothing_failed(folder: Path) -> None:
    found = rows((folder / "report.md").read_text(), "Each at its own best learning rate")
    assert found["prenorm"][:2] == ["3e-3", "2.020 ± 0.036 (3)"]
    assert found["spannorm"] == ["3e-3", "1.957 ± 0.021 (3)", "1e-3, 3e-3"], "1e-2 has a better mean, and a failure"
    assert found["postnorm"][0] == "3e-3"


def test_differences_are_paired_by_seed(folder: Path) -> None:
    """The t-test written out: t = mean / (sd / sqrt n) of the differences, with n - 1 degrees of freedom."""
    found = rows((folder / "report.md").read_text(), "Against prenorm")
    differences = np.subtract(LOSSES["spannorm", "3e-3"], LOSSES["prenorm", "3e-3"])
    t = differences.mean() / (differences.std(ddof=1) / np.sqrt(3))
    p = 2 * stdtr(2, -abs(t))
    verdict = "better" if p < 0.05 else "not told apart"
    assert found["spannorm"] == [f"{differences.mean():+.3f} (3)", f"{p:.3f}", verdict]
    shared = np.subtract(LOSSES["postnorm", "3e-3"], LOSSES["prenorm", "3e-3"][:2])
    assert found["postnorm"][0] == f"{shared.mean():+.3f} (2)"
    assert "prenorm" not in found


def test_a_difference_has_no_p_where_none_can_be_had(folder: Path) -> None:
    grid = cells(STUDY, [record(run, 2.0) for run in STUDY.runs()])
    same = compare(grid["spannorm", "1e-3"], grid["prenorm", "1e-3"])
    assert same is not None
    assert (same.difference, same.p, same.seeds) == (0.0, None, 3)
    one = cells(STUDY, [record(run, 2.0 + len(run.name) / 100) for run in STUDY.runs() if run.seed == 1])
    alone = compare(one["spannorm", "1e-3"], one["prenorm", "1e-3"])
    assert alone is not None
    assert (alone.p, alone.seeds) == (None, 1)
    assert tuned(STUDY, cells(STUDY, [])) == {}


def test_every_run_is_linked_and_the_page_is_whole(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    for run in STUDY.runs():
        if (folder / f"{run.name}.json").exists() and run.name != "postnorm_1e-2_seed1":
            assert f"[{run.name}]({run.name}.json)" in text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert {"map.png", "trend.png", "curves.png", "depth_1e-3.png", "cost.png"} <= set(pictures)
    assert all((folder / picture).stat().st_size > 1000 for picture in pictures)
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(pictures)
    assert not re.search(r'src="(?!data:)', page)
    assert "<table>" in page


def test_a_folder_without_a_study_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit) as leaving:
        cli.run(main)
    assert leaving.value.code == 2
    assert f"RUNS='{tmp_path}' is not valid" in capsys.readouterr().err


def test_training_failure_is_what_the_words_say() -> None:
    falling = [3.0 - i / 100 for i in range(100)]
    assert judge(falling, 2.0, 2.5) == FINISHED
    assert judge(falling, 2.5, 2.5) == UNLEARNED
    assert judge(falling, 2.5, None) == FINISHED
    assert judge(falling, None, 2.5) == NO_NUMBER
    assert judge([*falling[:-1], float("nan")], 2.0, 2.5) == NO_NUMBER
    assert judge([*falling[:50], float("nan"), *falling[51:]], 2.0, 2.5) == FINISHED, "recovered from"
    best = np.mean(falling[-20:-10])
    assert judge([*falling[:-10], *[1.09 * best] * 10], 2.0, 2.5) == FINISHED
    assert judge([*falling[:-10], *[1.11 * best] * 10], 2.0, 2.5) == ROSE
    assert BROKEN not in (FINISHED, ROSE)
