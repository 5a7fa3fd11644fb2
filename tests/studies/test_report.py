"""A report's numbers, recomputed with numpy from the stored records; what is missing or failed is shown as such."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import stdtr

from core import cli
from studies.grid import Planned, Study
from studies.record import COLLAPSED, DIVERGED, FINISHED, SLOW, SPIKING, Record, judge
from studies.report import main, write
from studies.tables import Cell, cells, compare, corrected, grids, judging_runs, tuned

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
        status=FINISHED if loss is not None else DIVERGED,
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
    assert found["spannorm"][2] == "failed: 1 diverged, 2 not", "the survivors' mean would hide the failure"
    assert found["postnorm"] == ["failed: 3 diverged", "2.450 ± 0.071 (2); 1 missing", "3 missing"]


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
    assert found["spannorm"][:3] == ["3e-3", "1.957 ± 0.021 (3)", "1e-3, 3e-3"], "1e-2 has a better mean, and a failure"
    assert found["postnorm"][0] == "3e-3"


def test_differences_are_paired_by_seed(folder: Path) -> None:
    """The t-test written out: t = mean / (sd / sqrt n) of the differences, with n - 1 degrees of freedom."""
    found = rows((folder / "report.md").read_text(), "Against prenorm")
    differences = np.subtract(LOSSES["spannorm", "3e-3"], LOSSES["prenorm", "3e-3"])
    t = differences.mean() / (differences.std(ddof=1) / np.sqrt(3))
    p = 2 * stdtr(2, -abs(t))
    verdict = "better" if 2 * p < 0.05 else "not told apart"  # by Holm: the smallest of two
    difference, _, p_shown, _, _, shown = found["spannorm"]
    assert (difference, p_shown, shown) == (f"{differences.mean():+.3f} (3)", f"{p:.3f}", verdict)
    shared = np.subtract(LOSSES["postnorm", "3e-3"], LOSSES["prenorm", "3e-3"][:2])
    assert found["postnorm"][0] == f"{shared.mean():+.3f} (2)"
    assert "prenorm" not in found


def test_runs_of_images_are_reported_in_their_unit_and_compared_by_accuracy(tmp_path: Path, undrawn: None) -> None:
    """SpanNorm's loss is higher here, and so is its accuracy, which is what these runs are for."""
    study = replace(STUDY, axes={"model.placement": {name: PLACEMENTS[name] for name in ("prenorm", "spannorm")}})
    study.save(tmp_path / "study.yaml")
    accuracies = {"prenorm": (0.90, 0.91, 0.89), "spannorm": (0.95, 0.97, 0.96)}
    for run in study.runs():
        name = run.point["model.placement"]
        figures = {"accuracy": accuracies[name][run.seed], "calibration_error": None}
        of_images = {"loss_unit": "nats per image", "figures": figures, "main": "accuracy"}
        replace(record(run, 0.3 if name == "prenorm" else 0.4), **of_images).save(tmp_path / f"{run.name}.json")
    text = write(tmp_path).read_text()
    assert "In nats per image: mean ± standard deviation over seeds" in text
    assert "nats per token" not in text
    assert rows(text, "Final validation loss")["prenorm"] == ["0.300 ± 0.000 (3)"]
    assert rows(text, "Final accuracy") == {"prenorm": ["0.900 ± 0.010 (3)"], "spannorm": ["0.960 ± 0.010 (3)"]}
    assert rows(text, "Final calibration error")["spannorm"] == [""]
    assert "Difference of the final accuracy, paired by seed" in text
    difference, _, _, _, _, verdict = rows(text, "Against prenorm")["spannorm"]
    assert (difference, verdict) == ("+0.060 (3)", "better")


def test_means_of_stability_hide_no_run(tmp_path: Path, undrawn: None) -> None:
    study = replace(STUDY, axes={"model.placement": {name: PLACEMENTS[name] for name in ("prenorm", "spannorm")}})
    study.save(tmp_path / "study.yaml")
    activations = {"prenorm": (20.0, float("inf"), 40.0), "spannorm": (20.0, None, 40.0)}
    for run in study.runs():
        largest = activations[run.point["model.placement"]][run.seed]
        written = replace(record(run, 2.0), clipped=0.5, largest_activation=largest)
        written.save(tmp_path / f"{run.name}.json")
        assert Record.load(tmp_path / f"{run.name}.json").largest_activation == largest
    text = write(tmp_path).read_text()
    assert rows(text, "Stability") == {
        "prenorm": ["-", "-", "0.5", "inf"],
        "spannorm": ["-", "-", "0.5", "30 (2 of 3)"],
    }
    assert "In brackets: of how many runs" in text


def test_a_difference_has_no_p_where_none_can_be_had(folder: Path) -> None:
    grid = cells(STUDY, [record(run, 2.0) for run in STUDY.runs()], STUDY.seeds)
    same = compare(grid["spannorm", "1e-3"], grid["prenorm", "1e-3"])
    assert same is not None
    assert (same.difference, same.p, same.seeds) == (0.0, None, 3)
    one = cells(STUDY, [record(run, 2.0 + len(run.name) / 100) for run in STUDY.runs() if run.seed == 1], STUDY.seeds)
    alone = compare(one["spannorm", "1e-3"], one["prenorm", "1e-3"])
    assert alone is not None
    assert (alone.p, alone.seeds) == (None, 1)
    assert tuned(STUDY, cells(STUDY, [], STUDY.seeds)) == {}


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


def test_a_status_is_what_the_words_say() -> None:
    """A curve of each kind; counted pairs give 2.5, counted tokens 3.4."""
    baselines = (2.5, 3.4)
    falling = [3.0 - i / 100 for i in range(100)]
    assert judge(falling, 2.0, *baselines) == FINISHED
    assert judge(falling, 2.49, *baselines) == FINISHED
    assert judge(falling, 2.5, *baselines) == SLOW
    assert judge(falling, 2.94, *baselines) == SLOW
    assert judge(falling, 2.96, *baselines) == COLLAPSED
    assert judge(falling, 3.43, *baselines) == COLLAPSED
    assert judge(falling, 3.43, None, None) == FINISHED, "with nothing to hold it against"
    assert judge(falling, None, *baselines) == DIVERGED
    assert judge([*falling[:-1], float("nan")], 2.0, *baselines) == DIVERGED
    assert judge([*falling[:50], float("nan"), *falling[51:]], 2.0, *baselines) == FINISHED, "recovered from"
    best = np.mean(falling[-20:-10])
    assert judge([*falling[:-10], *[1.09 * best] * 10], 2.0, *baselines) == FINISHED
    assert judge([*falling[:-10], *[1.11 * best] * 10], 2.0, *baselines) == DIVERGED
    near_zero = [1.4 * 0.9**i for i in range(80)] + [0.02] * 10
    assert judge([*near_zero, *[0.06] * 10], 0.05, None, 1.4) == FINISHED, "noise where there is hardly any loss left"
    assert judge([*near_zero, *[0.17] * 10], 0.15, None, 1.4) == DIVERGED
    assert judge([*near_zero, *[0.06] * 10], 0.05, None, None) == FINISHED, "the first loss says what is nothing"
    skipped = [*[5.0] * 5, float("nan"), *[5.0] * 4]
    assert judge([*falling[:-10], *skipped], 2.0, *baselines) == DIVERGED, "a step that was skipped hides nothing"
    assert judge([float("nan")] * 19 + [2.0], 2.0, *baselines) == FINISHED
    assert judge(falling, 2.0, *baselines, 99.0) == FINISHED
    assert judge(falling, 2.0, *baselines, 101.0) == SPIKING
    assert judge(falling, 2.6, *baselines, 101.0) == SLOW


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [((1.8512, 1.8488, 1.8594), (1.8521, 1.8497, 1.8603)), ((2.0, 2.0, 2.25), (2.25, 2.25, 2.5))],
)
def test_differences_that_are_equal_by_rounding_alone_have_no_p(
    ours: tuple[float, ...], theirs: tuple[float, ...]
) -> None:
    """A record has five digits; as floats the first three differ in the sixteenth, which made p 1e-26."""
    grid = cells(STUDY, [record(run, 0.0) for run in STUDY.runs()], STUDY.seeds)

    def cell(point: tuple[str, ...], losses: tuple[float, ...]) -> Cell:
        records = zip(grid[point].records, losses, strict=True)
        return replace(grid[point], records=tuple(replace(one, val_loss=loss) for one, loss in records))

    found = compare(cell(("spannorm", "1e-3"), ours), cell(("prenorm", "1e-3"), theirs))
    assert found is not None
    assert found.difference == pytest.approx(np.mean(np.subtract(ours, theirs)))
    assert (found.interval, found.p, found.detectable, found.seeds) == (None, None, None, 3)
    apart = compare(cell(("spannorm", "1e-3"), (*ours[:2], ours[2] + 2e-4)), cell(("prenorm", "1e-3"), theirs))
    assert apart is not None
    assert apart.p is not None


def test_a_small_difference_counts_as_none_where_the_study_says_so(tmp_path: Path, undrawn: None) -> None:
    losses = {"prenorm": (2.0, 2.1, 2.2), "spannorm": (1.991, 2.0911, 2.1909), "postnorm": (2.05, 2.1501, 2.2499)}
    study = replace(STUDY, axes={"model.placement": {name: PLACEMENTS[name] for name in losses}})
    for least, verdict in ((0.0, "better"), (0.01, "not told apart")):
        replace(study, least_difference=least).save(tmp_path / "study.yaml")
        for run in study.runs():
            record(run, losses[run.point["model.placement"]][run.seed]).save(tmp_path / f"{run.name}.json")
        text = write(tmp_path).read_text()
        found = rows(text, "Against prenorm")
        assert (found["spannorm"][-1], found["postnorm"][-1]) == (verdict, "worse")
        assert ("A difference of less than 0.01 counts as none." in text) == (least > 0)


def test_a_record_of_other_settings_is_not_the_runs(
    tmp_path: Path, undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    STUDY.save(tmp_path / "study.yaml")
    for run in STUDY.runs():
        record(run, 2.0).save(tmp_path / f"{run.name}.json")
    replace(STUDY, overrides=("trainer.max_steps=9",)).save(tmp_path / "study.yaml")
    text = write(tmp_path).read_text()
    assert "27 runs are planned (model.placement x optim.lr x 3 seeds); 0 have ended" in text
    assert "is the record of a run of other settings (trainer.max_steps=9)" in capsys.readouterr().err


SELECTING = Study(
    **{
        **vars(STUDY),
        "seeds": (1, 2, 3),
        "select_seeds": (0,),
        "axes": {**STUDY.axes, "optim": {"adamw": [], "muon": []}},
    }
)


def selection_loss(run: Planned) -> float:
    """Best at 3e-3 under adamw and at 1e-2 under muon; the judging seeds would say otherwise."""
    best = "3e-3" if run.point["optim"] == "adamw" else "1e-2"
    is_best = run.point["optim.lr"] == best
    if run.seed == 0:
        return 2.0 if is_best else 2.1
    return 2.5 + 0.01 * run.seed + (0.02 * run.seed**2 if run.point["model.placement"] == "spannorm" else 0.0)


def test_seeds_that_select_a_rate_do_not_judge_it(tmp_path: Path, undrawn: None) -> None:
    SELECTING.save(tmp_path / "study.yaml")
    assert Study.load(tmp_path / "study.yaml") == SELECTING
    grid = SELECTING.runs()
    assert {run.seed for run in grid} == {0}
    records = [record(run, selection_loss(run)) for run in grid]
    waiting = judging_runs(SELECTING, records[:-1])  # the last is one of the rates of postnorm under muon
    assert ("postnorm", "muon") not in {(run.point["model.placement"], run.point["optim"]) for run in waiting}
    assert len(waiting) == 3 * 5
    judging = judging_runs(SELECTING, records)
    assert len(judging) == 3 * 2 * 3
    assert all(run.point["optim.lr"] == ("3e-3" if run.point["optim"] == "adamw" else "1e-2") for run in judging)
    for run in (*grid, *judging):
        record(run, selection_loss(run)).save(tmp_path / f"{run.name}.json")
    text = write(tmp_path).read_text()
    assert "36 runs are planned" in text
    assert "36 have ended" in text
    tuned_rows = rows(text, "Each at its own best learning rate")
    assert tuned_rows["prenorm muon"][:2] == ["1e-2 (at the edge of the grid)", "2.520 ± 0.010 (3)"]
    assert rows(text, "Final validation loss")["prenorm"][0] == "2.100 (1)"
    against = rows(text, "Against prenorm")
    assert against["spannorm"][1].startswith(f"{np.mean([0.02, 0.08, 0.18]):+.3f} (3)")


@pytest.mark.parametrize("shorter", [(), ("trainer.max_steps=5",)])
def test_figures_of_short_selecting_runs_are_not_mixed_with_those_of_judging_ones(
    tmp_path: Path, undrawn: None, shorter: tuple[str, ...]
) -> None:
    study = replace(SELECTING, select_overrides=shorter)
    study.save(tmp_path / "study.yaml")
    grid = [record(run, selection_loss(run)) for run in study.runs()]
    for one in (*grid, *(record(run, selection_loss(run)) for run in judging_runs(study, grid))):
        judges = one.seed != 0
        measured = {"largest_activation": 100.0 if judges else 10.0, "seconds": 100.0 if judges else 10.0}
        replace(one, **measured, outcomes={"late_drop": 3.0 if judges else 1.0}).save(tmp_path / f"{one.name}.json")
    text = write(tmp_path).read_text()
    judged, selecting = "prenorm 3e-3 adamw", "prenorm 1e-3 adamw"
    found = rows(text, "Stability")
    assert (found[judged][-1], found[selecting][-1]) == ("100" if shorter else "77.5", "10")
    found = rows(text, "Outcomes")
    assert found[judged][0] == ("3 ± 0 (3)" if shorter else "2.5 ± 1 (4)")
    assert found[selecting][0] == "1 (1)"
    assert (f"with seeds 0 and {' '.join(shorter)}, the loss" in text) == bool(shorter)


def test_what_is_not_to_be_judged_is_not_missing(tmp_path: Path, undrawn: None) -> None:
    study = replace(SELECTING, judge=("prenorm", "spannorm"))
    study.save(tmp_path / "study.yaml")
    grid = [record(run, selection_loss(run)) for run in study.runs()]
    judging = judging_runs(study, grid)
    assert {run.point["model.placement"] for run in judging} == {"prenorm", "spannorm"}
    for one in (*grid, *(record(run, selection_loss(run)) for run in judging)):
        one.save(tmp_path / f"{one.name}.json")
    text = write(tmp_path).read_text()
    assert "30 runs are planned" in text
    assert "missing" not in text
    assert rows(text, "Each at its own best learning rate")["postnorm muon"][1] == "no run yet"
    assert set(rows(text, "Against prenorm")) == {"spannorm"}


def test_intervals_and_corrections_by_their_textbook_formulas() -> None:
    grid = grids(STUDY, [record(run, LOSSES[tuple(run.point.values())][run.seed]) for run in STUDY.runs() if full(run)])
    found = compare(grid.judged["spannorm", "3e-3"], grid.judged["prenorm", "3e-3"])
    assert found is not None
    assert found.interval is not None
    assert found.p is not None
    differences = np.subtract(LOSSES["spannorm", "3e-3"], LOSSES["prenorm", "3e-3"])
    reach = 4.302653 * differences.std(ddof=1) / np.sqrt(3)  # the 97.5 % quantile of t with 2 degrees of freedom
    assert found.interval == pytest.approx((differences.mean() - reach, differences.mean() + reach), rel=1e-6)
    # Noncentral t: power 0.8 at 5 % with three pairs needs 3.26 standard deviations.
    assert found.detectable == pytest.approx(3.2640 * differences.std(ddof=1), rel=1e-3)
    several = [found._replace(p=p) for p in (0.01, 0.04, 0.03)]
    assert corrected(several) == pytest.approx([0.03, 0.06, 0.06])
    failed = corrected([several[0], None, *several[1:]])
    assert failed == pytest.approx([0.04, None, 0.09, 0.09]), "one that failed was to be tested, too"


def full(run: Planned) -> bool:
    losses = LOSSES[tuple(run.point.values())]
    return len(losses) == 3 and None not in losses
