"""What each policy does, against the papers' rules written out again; rollback's are in test_rollback.py."""

import math
from typing import Any

import pytest
import torch

from callbacks.divergence.detectors import NONFINITE_GRADIENT, Alarm
from callbacks.divergence.divergence import Divergence
from callbacks.divergence.policies.adagc import AdaGC
from callbacks.divergence.policies.base import GiveUp, Policy
from callbacks.divergence.policies.skip import Skip
from callbacks.divergence.policies.stop import Stop
from callbacks.divergence.policies.warn import Warn
from callbacks.divergence.policies.zclip import ZClip
from core.errors import ConfigError
from tests.support.policy_runs import DRIFT, SPIKE, Run, resumed


def test_warn_changes_nothing_and_says_it_once_in_a_while() -> None:
    run = Run(Warn(quiet=3))
    before = run.weights()
    assert [run.step(*alarms) for alarms in ([SPIKE],) * 9] == ["went on", None, None, None] * 2 + ["went on"]
    assert run.step(DRIFT) == "went on", "another kind"
    assert run.step() is None
    assert run.weights() != before
    run.policy = resumed(run.policy, Warn(quiet=3))
    assert run.step(SPIKE) is None


def test_skip_gives_up_after_too_many_in_a_row() -> None:
    run = Run(Skip(max_in_a_row=2))
    before = run.weights()
    assert [run.step(SPIKE), run.step(SPIKE)] == ["skipped the step (1 in a row)", "skipped the step (2 in a row)"]
    assert run.weights() == before
    assert run.step() is None, "a healthy step starts the count anew"
    assert run.weights() != before
    run.step(SPIKE)
    run.policy = resumed(run.policy, Skip(max_in_a_row=2))
    run.step(SPIKE)
    with pytest.raises(GiveUp, match="2 skipped steps in a row did not help"):
        run.step(SPIKE)


def test_skip_gives_up_where_much_of_the_data_is_left_out() -> None:
    """Every other step is skipped, so never two in a row; the first 20 lie more than 100 steps back at the end."""
    run = Run(Skip(max_in_a_row=2, max_in_100=20))
    for _ in range(20):
        run.step(SPIKE)
        run.step()
    with pytest.raises(GiveUp, match="20 of the last 100 steps were skipped"):
        run.step(SPIKE)
    for _ in range(100):
        run.step()
    run.policy = resumed(run.policy, Skip(max_in_a_row=2, max_in_100=20))
    for _ in range(20):
        run.step(SPIKE)
        run.step()
    run.policy = resumed(run.policy, Skip(max_in_a_row=2, max_in_100=20))
    with pytest.raises(GiveUp, match="20 of the last 100"):
        run.step(SPIKE)


def test_a_skipped_step_is_not_in_the_history() -> None:
    run = Run(Skip())
    run.step()
    state = run.detectors.state_dict()
    run.step(SPIKE)
    assert run.detectors.state_dict() == state


def test_stop_gives_up_at_once() -> None:
    run = Run(Stop())
    assert run.step() is None
    with pytest.raises(GiveUp):
        run.step(SPIKE)


def zclip_by_hand(norms: list[float]) -> list[float]:
    """2504.02507, algorithm 1, after 25 steps of warm-up."""
    warm_up = torch.tensor(norms[:25], dtype=torch.float64)
    mean, variance, clipped = float(warm_up.mean()), float(warm_up.var(correction=0)), norms[:25]
    for norm in norms[25:]:
        z = (norm - mean) / math.sqrt(variance)
        target = norm if z <= 2.5 else mean + 2.5 / z * 2.5 * math.sqrt(variance)
        mean = 0.97 * mean + 0.03 * target
        variance = 0.97 * variance + 0.03 * (target - mean) ** 2
        clipped = [*clipped, target]
    return clipped


def test_zclip_is_that_of_the_paper_also_when_resumed() -> None:
    norms = (1 + 0.1 * torch.randn(60)).tolist()
    norms[40], norms[50] = 20.0, 3.0
    run, found = Run(ZClip()), []
    for number, norm in enumerate(norms):
        if number in (10, 45):
            run.policy = resumed(run.policy, ZClip())
        run.step(gradients=(0.6 * norm, 0.8 * norm))
        found.append(math.hypot(*run.norms))
        assert run.norms[0] / run.norms[1] == pytest.approx(0.75), "the direction stays"
    assert found == pytest.approx(zclip_by_hand(norms), rel=1e-5)
    assert found[40] < 1.5 < 3.0 > found[50]


def adagc_by_hand(norms: list[tuple[float, float]], warm_up: int) -> list[list[float]]:
    """2502.11034, algorithm 1."""
    gamma, out = [math.inf, math.inf], []
    for number, pair in enumerate(norms, start=1):
        if number <= warm_up:
            h = min(1.0, 1.0 / math.hypot(*pair))
            clipped = [h * norm for norm in pair]
            gamma = [min(old, new) for old, new in zip(gamma, clipped, strict=True)]
        else:
            clipped = [min(1.0, 1.05 * old / norm) * norm for old, norm in zip(gamma, pair, strict=True)]
            gamma = [0.98 * old + 0.02 * new for old, new in zip(gamma, clipped, strict=True)]
        out.append(clipped)
    return out


def test_adagc_is_that_of_the_paper_also_when_resumed() -> None:
    norms = [(a, b) for a, b in (0.5 + torch.rand(40, 2)).tolist()]
    norms[30] = (50.0, 0.7)
    run, found = Run(AdaGC(warmup_steps=20)), []
    for number, pair in enumerate(norms):
        if number in (10, 29):
            run.policy = resumed(run.policy, AdaGC(warmup_steps=20))
        run.step(gradients=pair)
        found.append(run.norms)
    for ours, theirs in zip(found, adagc_by_hand(norms, 20), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_adagc_learns_anew_where_other_tensors_have_a_gradient() -> None:
    policy = AdaGC(warmup_steps=1)
    for norms in ([1.0, 2.0], [1.0, 2.0], [1.0, 2.0, 3.0]):
        assert policy.factors(torch.tensor(norms), math.hypot(*norms)).shape == (len(norms),)


def test_adagc_does_not_hold_a_tensor_at_zero_whose_gradient_began_there() -> None:
    run = Run(AdaGC(warmup_steps=3))
    for _ in range(4):
        run.step(gradients=(0.5, 0.0))
    run.step(gradients=(0.5, 0.25))
    assert run.norms == pytest.approx([0.5, 0.25])
    run.step(gradients=(0.5, 2.5))
    assert run.norms == pytest.approx([0.5, 1.05 * 0.25])


@pytest.mark.parametrize("policy", [ZClip(max_in_a_row=2), AdaGC(max_in_a_row=2)], ids=["zclip", "adagc"])
def test_what_cannot_be_clipped_is_skipped(policy: Policy) -> None:
    run, alarm = Run(policy), Alarm(NONFINITE_GRADIENT, math.nan, 1.0, math.inf)
    run.step()
    before = run.weights()
    for _ in range(2):
        assert (run.step(alarm, gradients=(math.nan, 1.0)) or "").startswith("skipped the step")
    assert run.weights() == before
    run.step()  # after which it counts anew
    for _ in range(2):
        run.step(alarm, gradients=(math.nan, 1.0))
    with pytest.raises(GiveUp):
        run.step(alarm, gradients=(math.inf, 1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "roll_back"}, "callbacks.divergence.policy='roll_back' .*did you mean rollback"),
        ({"policy": "skip", "policy_options": {"every": 3}}, r"policy_options\.every=3 .* no such field"),
        ({"policy": "skip", "policy_options": {"max_in_a_row": 0}}, "max_in_a_row=0 is not valid: expected an integer"),
        ({"policy": "rollback", "policy_options": {"every": 5}}, "every=5 is not valid: expected .* >= margin=10"),
        ({"policy": "rollback", "policy_options": {"lr_factor": 0.0}}, r"lr_factor=0.0 .* a number in \(0, 1\]"),
        ({"policy": "zclip", "policy_options": {"decay": 1.0}}, r"decay=1.0 .* a number in \(0, 1\)"),
        ({"loss_threshold": 0.0}, "callbacks.divergence.loss_threshold=0.0 is not valid: expected a number > 0"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Divergence(run_dir="nowhere", **arguments)
