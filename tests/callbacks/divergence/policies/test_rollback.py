"""When a rollback happens, to which snapshot, and what it brings back; test_recovery.py has real runs."""

import pytest

from callbacks.divergence.policies.base import GiveUp
from callbacks.divergence.policies.rollback import Rollback
from tests.support.policy_runs import DRIFT, SPIKE, Run, resumed


def held(run: Run) -> list[int]:
    """The steps of its snapshots."""
    return [snapshot.step for snapshot in run.policy.snapshots]  # type: ignore[attr-defined]


def test_rollback_skips_first_then_goes_back_behind_the_margin_and_cuts_the_learning_rate() -> None:
    run = Run(Rollback(every=10, margin=5, patience=2, cooldown=6))
    after = [run.weights()]
    for _ in range(23):
        assert run.step() is None
        after.append(run.weights())
    of_the_snapshot = run.policy.snapshots[0]  # type: ignore[attr-defined]
    assert len(of_the_snapshot.detectors["loss"]["values"]) == 10
    assert run.step(SPIKE) == "skipped the step"
    assert run.weights() == after[23]
    assert run.step(SPIKE) == "rolled back to step 10, learning rate x 0.5 to step 31", "step 20 is too young"
    assert run.weights() == after[10]
    assert run.detectors.state_dict() == of_the_snapshot.detectors
    assert run.optimizer.state[run.model.weight]["step"] == 10

    reference = Run(Rollback(every=10, margin=5, patience=2, cooldown=6))
    for _ in range(10):
        reference.step()
    for number in range(26, 34):
        run.step()
        reference.optimizer.param_groups[0]["lr"] = 0.05 if number <= 31 else 0.1
        reference.step()
        assert run.weights() == reference.weights(), number
        assert run.optimizer.param_groups[0]["lr"] == 0.1


def test_a_climb_goes_back_at_once_and_before_the_first_step_of_all() -> None:
    run = Run(Rollback(every=10, margin=5, patience=2))
    before = run.weights()
    for _ in range(3):
        run.step()
    assert (run.step(DRIFT) or "").startswith("rolled back to step 0")
    assert run.weights() == before
    assert run.optimizer.state == {}, "it had not stepped yet"
    run.step()
    assert run.weights() != before


def test_a_snapshot_has_to_be_older_than_the_trouble_not_than_its_alarm() -> None:
    run = Run(Rollback(every=10, margin=5))
    for _ in range(36):
        run.step()
    assert (run.step(DRIFT._replace(age=10)) or "").startswith("rolled back to step 20"), "30 was already in trouble"


def test_a_snapshot_that_is_due_waits_until_the_margin_after_an_alarm_has_passed() -> None:
    run = Run(Rollback(every=10, margin=5))
    for number in range(1, 31):
        run.step(*[SPIKE] * (number == 20))
        if number <= 25:
            assert held(run) == ([0] if number <= 10 else [0, 10]), number
    assert held(run) == [10, 25], "and not 20"
    run.step()
    assert held(run) == [25, 30], "the next one is in time again"


def test_no_snapshot_is_taken_of_a_step_with_an_alarm_while_there_is_another_way() -> None:
    run = Run(Rollback(every=10, margin=5, patience=3))
    run.step(SPIKE)
    run.step(SPIKE)
    assert held(run) == []
    assert (run.step(SPIKE) or "").startswith("rolled back to step 2"), "there is none: only the rate can be cut"
    run = Run(Rollback(every=10, margin=5, patience=3))
    run.step(SPIKE)
    run.step()
    assert held(run) == [1]


def test_a_snapshot_that_fails_at_once_is_left_for_an_older_one() -> None:
    run = Run(Rollback(every=10, margin=5, patience=2))
    for _ in range(25):
        run.step()
    said = [run.step(DRIFT), run.step(DRIFT), run.step(DRIFT)]
    assert [words.split(",")[0] for words in said if words] == ["rolled back to step 20"] + [
        "rolled back to step 10"
    ] * 2


def test_a_snapshot_that_lasted_is_gone_back_to_again() -> None:
    """It fails where an alarm that counts comes within margin + patience steps of the rollback to it, and not after."""
    for healthy, expected in ((5, "rolled back to step 10"), (6, "rolled back to step 20")):
        run = Run(Rollback(every=10, margin=5, patience=2))
        for _ in range(25):
            run.step()
        assert (run.step(DRIFT) or "").startswith("rolled back to step 20")
        run.policy.due = 1000  # type: ignore[attr-defined]  # no new snapshot comes between
        for _ in range(healthy + 1):
            run.step()
        assert (run.step(DRIFT) or "").startswith(expected), healthy


def test_rollback_gives_up_after_too_many_without_a_recovery() -> None:
    run = Run(Rollback(every=10, margin=5, patience=2, cooldown=2, max_in_a_row=2))
    run.step(DRIFT)
    for _ in range(10):
        run.step()
    for _ in range(2):
        assert "learning rate x 0.5 " in (run.step(DRIFT) or "") or run.number > 12
    with pytest.raises(GiveUp, match="2 rollbacks in a row did not help"):
        run.step(DRIFT)


def test_a_resumed_rollback_goes_on_alike_amid_a_recovery() -> None:
    """Without a file of snapshots it has the checkpoint as one; all the rest is as if nobody had stopped."""
    runs = []
    for stop in (False, True):
        run = Run(Rollback(every=10, margin=5, patience=2, cooldown=20))
        for _ in range(15):
            run.step()
        run.step(SPIKE)
        run.step(SPIKE)
        run.step()
        run.step(SPIKE)
        if stop:
            run.policy = resumed(run.policy, Rollback(every=10, margin=5, patience=2, cooldown=20))
        for _ in range(21):
            run.step()
        runs.append(run)
    assert runs[0].weights() == runs[1].weights()
    assert runs[0].policy.state_dict() == runs[1].policy.state_dict()
    assert held(runs[0]) == held(runs[1])
