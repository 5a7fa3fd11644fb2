"""How the learning rate is cut after a rollback."""

from callbacks.divergence.policies.cooldown import Cooldown


def test_a_cut_grows_while_trouble_comes_back_and_starts_anew_after_a_recovery() -> None:
    cooldown = Cooldown(0.5, 10)
    assert cooldown.factor_at(1) == 1.0
    cooldown.start(100)
    assert [cooldown.factor_at(step) for step in (100, 101, 110, 111)] == [1.0, 0.5, 0.5, 1.0]
    cooldown.start(115)
    assert [cooldown.factor_at(step) for step in (116, 135, 136)] == [0.25, 0.25, 1.0]
    cooldown.start(156)
    assert [cooldown.factor_at(step) for step in (157, 166, 167)] == [0.5, 0.5, 1.0]
