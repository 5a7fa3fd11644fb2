"""A run that learns nothing ends early, with its reason; one that learns does not."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from callbacks.divergence.stop_hopeless import StopHopeless
from core.errors import ConfigError
from studies.grid import Planned
from studies.record import COLLAPSED, DIVERGED, collect
from tests.support.runs import Finished, scalars, tiny_job, train

RULE = "+callbacks.stop_hopeless._target_=callbacks.divergence.stop_hopeless.StopHopeless"
LONG = (RULE, "trainer.max_steps=40", "trainer.val_check_interval=40", "trainer.log_every_n_steps=1", "run_dir=run")
LEARNS_NOTHING = ("optim.lr=1e-12", "optim.warmup_steps=0")  # the loss stays at log(257), above the frequencies'


class StopsAtSeven(L.Callback):
    """Stops a run as callbacks of one's own do."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 7


def ended(cwd: Path, *overrides: str) -> tuple[Finished, dict[str, object]]:
    """Run it, and return what it printed and its status."""
    finished = train(cwd, *tiny_job(*LONG, *overrides))
    return finished, json.loads((cwd / "run/status.json").read_text())


def record(cwd: Path) -> tuple[str, str, float | None]:
    found = collect(Planned("run", {"x": "y"}, 0, ()), cwd / "run")
    return found.status, found.reason, found.val_loss


def test_a_run_that_learns_nothing_ends_after_a_fifth(tmp_path: Path) -> None:
    finished, status = ended(tmp_path, *LEARNS_NOTHING)
    assert finished.code == 0
    assert (status["status"], status["step"]) == ("stopped", 9), "seen when the ninth step begins, which is done"
    losses = list(scalars(tmp_path / "run", "train/loss").values())
    unigram = json.loads((tmp_path / "run/summary.json").read_text())["unigram_loss"]
    mean = sum(losses[4:8]) / 4
    compared = f"training loss {mean:.3f} over the last 4 logged steps, above {unigram:.3f}"
    reason = f"StopHopeless: {compared} of the tokens' frequencies"
    assert status["reason"] == reason
    assert f"Ended early, after step 9 of 40: {reason}." in finished.out
    (validation,) = scalars(tmp_path / "run", "val/loss").values()
    assert record(tmp_path) == (COLLAPSED, reason, pytest.approx(validation, rel=1e-4))


def test_a_loss_that_is_no_number_ends_it_at_once(tmp_path: Path) -> None:
    _, status = ended(tmp_path, "optim.lr=1e38", "optim.warmup_steps=0", "trainer.gradient_clip_val=null")
    assert status["status"] == "diverged"
    assert isinstance(status["step"], int)
    assert status["step"] < 8
    assert str(status["reason"]).startswith("StopHopeless: training loss nan at step")
    assert record(tmp_path)[0] == DIVERGED


def test_a_run_that_learns_goes_on_to_its_end(tmp_path: Path) -> None:
    _, status = ended(tmp_path, "optim.lr=1e-2", "optim.warmup_steps=0", "+callbacks.stop_hopeless.after=0.9")
    assert (status["status"], status["step"], status["reason"]) == ("done", 40, None)


def test_the_losses_before_a_stop_are_not_forgotten(tmp_path: Path) -> None:
    mine = "+callbacks.mine._target_=tests.callbacks.divergence.test_stop_hopeless.StopsAtSeven"
    assert ended(tmp_path, *LEARNS_NOTHING, mine)[1]["step"] == 7
    _, status = ended(tmp_path, *LEARNS_NOTHING, "ckpt_path=last")
    assert status["step"] == 9
    assert "over the last 4 logged steps" in str(status["reason"])


@pytest.mark.parametrize("after", [0.05, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(after: float) -> None:
    with pytest.raises(ConfigError, match=r"callbacks.stop_hopeless.after=.* is not valid: expected a number from 0.1"):
        StopHopeless(after)
