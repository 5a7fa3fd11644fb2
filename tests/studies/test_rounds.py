"""The order in which a study trains: what it is to judge comes before the rest of its grid."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from studies.grid import LEARNING_RATE, Planned, Study
from studies.plan import Plan, rounds
from studies.record import FINISHED, Record

AXES = {"scheme": {"late": [], "judged": [], "base": []}, LEARNING_RATE: {"1": ["optim.lr=1"], "2": ["optim.lr=2"]}}


def plan_of(folder: Path, judge: Sequence[str], select_seeds: Sequence[int]) -> Plan:
    study = Study(
        "mine", "laptop", "?", "", AXES, "base", (0, 1), (), tuple(select_seeds), judge=tuple(judge)
    )  # fmt: skip
    return Plan(study, study, folder, folder)


def finish(plan: Plan, runs: Sequence[Planned]) -> None:
    for run in runs:
        loss = 1 / float(run.point[LEARNING_RATE])
        Record(run.name, dict(run.point), run.seed, list(run.overrides), FINISHED, "", val_loss=loss).save(
            plan.record_of(run)
        )


@pytest.mark.parametrize(
    ("judge", "select_seeds", "expected"),
    [
        (
            ["judged", "base"],
            [7],
            [
                "judged_1_seed7 judged_2_seed7 base_1_seed7 base_2_seed7",
                "judged_2_seed0 base_2_seed0 judged_2_seed1 base_2_seed1",
                "late_1_seed7 late_2_seed7",
            ],
        ),
        (
            [],
            [7],
            [
                "late_1_seed7 late_2_seed7 judged_1_seed7 judged_2_seed7 base_1_seed7 base_2_seed7",
                "late_2_seed0 judged_2_seed0 base_2_seed0 late_2_seed1 judged_2_seed1 base_2_seed1",
            ],
        ),
        (
            [],
            [],
            [
                "late_1_seed0 late_2_seed0 judged_1_seed0 judged_2_seed0 base_1_seed0 base_2_seed0 "
                "late_1_seed1 late_2_seed1 judged_1_seed1 judged_2_seed1 base_1_seed1 base_2_seed1"
            ],
        ),
    ],
    ids=["some are judged", "all are judged", "no seeds of selection"],
)
def test_what_is_judged_comes_first(
    tmp_path: Path, judge: list[str], select_seeds: list[int], expected: list[str]
) -> None:
    plan = plan_of(tmp_path, judge, select_seeds)
    trained = []
    for batch in rounds(plan):
        finish(plan, batch)
        trained.append(" ".join(run.name for run in batch))
    assert trained == expected
