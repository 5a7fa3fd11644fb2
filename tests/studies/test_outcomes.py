"""What a study measures of finished models: kept in the record, shown in the report, measured later where it lacks."""

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from analysis.anatomy.held_out import held_out
from analysis.anatomy.layer_drop import LayerDrop
from core.errors import ConfigError
from core.open_run import open_run
from studies.grid import Study
from studies.plan import Plan, planned
from studies.record import DIVERGED, FINISHED, Record
from studies.report import write
from studies.run import lacks_outcomes, with_outcomes
from tests.support.runs import run
from tests.support.tool_runs import SMALL
from tools.examination import examine

STUDY = Study("mine", "laptop", "Which?", "little", {"model.norm": {"rmsnorm": [], "layernorm": []}}, None, (0, 1), ())


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Of two points and seeds; the first one's run is there, with its record."""
    cwd = tmp_path_factory.mktemp("study")
    made = Plan(STUDY, STUDY, cwd / "results", cwd, ("layer_drop", "late_contribution"))
    run(cwd, "rmsnorm_seed0", *SMALL)
    first = STUDY.runs()[0]
    point, overrides = dict(first.point), list(first.overrides)
    Record(first.name, point, 0, overrides, FINISHED, str(cwd / "rmsnorm_seed0")).save(made.record_of(first))
    return made


def test_outcomes_are_measured_of_the_last_weights_and_kept(plan: Plan) -> None:
    first, *others = STUDY.runs()
    assert [lacks_outcomes(plan, planned_run) for planned_run in (first, others[0])] == [True, False]
    folder, path = plan.runs / first.name, plan.record_of(first)
    measured = with_outcomes(Record.load(path), folder, plan.outcomes)
    measured.save(path)
    assert Record.load(path).outcomes == pytest.approx(measured.outcomes)
    assert set(measured.outcomes) == {"layer_drop", "late_contribution"}
    assert not lacks_outcomes(plan, first)
    opened = open_run(folder)
    opened.datamodule.prepare_data()
    found = LayerDrop()(opened.module.model, held_out(opened.datamodule, opened.module, 16384))
    assert measured.outcomes["layer_drop"] == pytest.approx(found.scalars["layer_drop"], rel=1e-4, abs=1e-7)
    more = with_outcomes(measured, folder, ("loss",))
    assert set(more.outcomes) == {"layer_drop", "late_contribution", "loss"}


def test_a_run_that_failed_or_cannot_be_opened_keeps_its_record(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = replace(Record.load(plan.record_of(STUDY.runs()[0])), outcomes={})
    folder = plan.runs / record.name
    assert with_outcomes(replace(record, status=DIVERGED), folder, plan.outcomes).outcomes == {}
    assert with_outcomes(record, tmp_path, plan.outcomes).outcomes == {}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").write_bytes(b"broken")
    assert with_outcomes(record, tmp_path, plan.outcomes) == record
    assert re.match(r"rmsnorm_seed0: no outcomes: .*\n$", capsys.readouterr().err)


def test_classes_of_the_users_own_are_made_where_the_overrides_name_them(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(plan.runs / "rmsnorm_seed0", tmp_path / "rmsnorm_seed0")
    placement = "spannorm.placements.spannorm.SpanNorm"  # what has a dot is taken for code of somebody's own
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["module"]["model"]["placement"] = placement
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    record = Record("rmsnorm_seed0", {}, 0, [f"model.placement={placement}"], FINISHED, str(folder))
    assert with_outcomes(record, folder, ("loss",)).outcomes["loss"] == pytest.approx(math.log(256), abs=1)
    capsys.readouterr()
    assert with_outcomes(replace(record, overrides=["model.placement=spannorm"]), folder, ("loss",)).outcomes == {}
    assert "allow=spannorm.placements.spannorm.SpanNorm runs it" in capsys.readouterr().err


def test_what_is_no_number_is_kept_as_none_and_not_measured_again(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """expert_drop is nothing of a dense model; the others are what a diverged one has."""
    first = STUDY.runs()[0]
    odd = {"loss": math.nan, "late_drop": math.inf, "hessian_top": 2e15, "layer_drop": -1e15}
    plan = plan._replace(results=tmp_path, outcomes=(*odd, "expert_drop"))
    folder, path = plan.runs / first.name, plan.record_of(first)
    record = Record(first.name, dict(first.point), 0, list(first.overrides), FINISHED, str(folder))
    measured = with_outcomes(record, folder, ("expert_drop",))
    assert measured.outcomes == {"expert_drop": None}
    monkeypatch.setattr(examine, "outcomes_of", lambda *arguments, **options: odd)
    with_outcomes(measured, folder, tuple(odd)).save(path)
    expected = {"expert_drop": None, "loss": None, "late_drop": None, "hessian_top": None, "layer_drop": -1e15}
    assert Record.load(path).outcomes == expected
    assert not lacks_outcomes(plan, first)


def test_the_report_has_a_table_of_them(plan: Plan, tmp_path: Path, undrawn: None) -> None:
    STUDY.save(tmp_path / "study.yaml")
    for planned_run in STUDY.runs():
        point, overrides = dict(planned_run.point), list(planned_run.overrides)
        drop = {"layer_drop": 0.1 + planned_run.seed / 10} if point["model.norm"] == "rmsnorm" else {"layer_drop": None}
        outcomes = {**drop, "expert_drop": None}
        made = Record(
            planned_run.name, point, planned_run.seed, overrides, FINISHED, "", outcomes=outcomes, val_loss=2.0
        )
        made.save(tmp_path / f"{planned_run.name}.json")
    text = write(tmp_path).read_text()
    assert "## Outcomes" in text
    assert "| rmsnorm | 0.15 ± 0.071 (2) |\n" in text
    assert "expert_drop" not in text


def test_names_are_known_before_anything_runs() -> None:
    assert planned(["study=depth", "outcomes=[layer_drop,lens_effective_share]"]).outcomes == (
        "layer_drop",
        "lens_effective_share",
    )
    with pytest.raises(ConfigError, match=r"outcomes='layer_dorp' is not valid: .*did you mean layer_drop"):
        planned(["study=depth", "outcomes=[layer_dorp]"])
    with pytest.raises(ConfigError, match=r"outcomes='layer_drop' is not valid: expected a list of names"):
        planned(["study=depth", "outcomes=layer_drop"])
