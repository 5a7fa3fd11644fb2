"""kill -9 at any moment: what was begun goes on, and comes to the same curve and the same weights, bit for bit."""

import json
import random
import signal
from pathlib import Path

import pytest

from core.status import is_done, read
from tests.support.comparing import assert_equal
from tests.support.killed import PLACES, Moments, Processes
from tests.support.runs import load, scalars, tiny_job

STEPS = 6
JOB = tiny_job(
    "experiment=moe_spannorm",
    "run_dir=run",
    "data.root=data",
    "model.moe.jitter=0.3",
    f"trainer.max_steps={STEPS}",
    "trainer.accumulate_grad_batches=2",
    "trainer.val_check_interval=4",
    "callbacks.last_checkpoint.every_n_train_steps=1",
    "callbacks.divergence.policy=rollback",
    "callbacks.divergence.policy_options={every: 2, margin: 1}",
)
CURVES = ("train/loss", "optim/grad_norm", "train/tokens", "val/loss")
MEASURED_BY_THE_CLOCK = {"seconds", "total_seconds", "tokens_per_second"}


@pytest.fixture(scope="module")
def processes() -> Processes:
    return Processes()


@pytest.fixture(scope="module")
def uninterrupted(processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """(the reference, how many moments there are in each place)."""
    cwd = tmp_path_factory.mktemp("uninterrupted")
    code, (finished, moments) = processes.run(cwd, *JOB, moments=Moments())
    assert (code, finished.code) == (0, 0), finished.err
    assert moments.keys() == PLACES.keys()
    return cwd / "run", moments


def kill_and_resume(processes: Processes, cwd: Path, moments: dict[str, int], place: str, seed: int) -> None:
    number = random.Random(f"{place} {seed}").randint(1, moments[place])
    code, _ = processes.run(cwd, *JOB, moments=Moments(place, number))
    if code == 0:  # a few calls fewer than in the reference
        return
    assert code == -signal.SIGKILL
    resume = ["ckpt_path=last"] if (cwd / "run/config.yaml").exists() else []
    over = is_done(cwd / "run", STEPS)  # killed behind its very last word
    code, (finished, _) = processes.run(cwd, *JOB, *resume)
    assert code == 0
    assert finished.code == (2 if over else 0), f"{place} {number}: {finished.err}"
    assert not over or f"expected more than {STEPS}, the step of the checkpoint" in finished.err


def assert_same(ours: Path, theirs: Path) -> None:
    for tag in CURVES:
        assert scalars(ours, tag) == scalars(theirs, tag), tag
    mine, others = (load(path / "checkpoints/last.ckpt") for path in (ours, theirs))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "PythonStdlib", "global_step"):
        assert_equal(mine[part], others[part], part)
    best, others_best = (load(path / "checkpoints/best.ckpt") for path in (ours, theirs))
    assert_equal(best["state_dict"], others_best["state_dict"], "best")
    assert {path.name for path in (ours / "checkpoints").iterdir()} >= {"last.ckpt", "previous.ckpt", "best.ckpt"}
    assert not list(ours.rglob("*.unfinished"))
    summary, other = (json.loads((path / "summary.json").read_text()) for path in (ours, theirs))
    assert summary.keys() == other.keys()
    assert {key for key in summary if summary[key] != other[key]} <= MEASURED_BY_THE_CLOCK
    assert all(summary[key] > 0 for key in MEASURED_BY_THE_CLOCK)
    assert read(ours) == read(theirs)


def test_a_killed_run_goes_on(processes: Processes, uninterrupted: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    reference, moments = uninterrupted
    kill_and_resume(processes, tmp_path, moments, "checkpoint", 0)
    assert_same(tmp_path / "run", reference)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("place", PLACES)
def test_fifty_moments(
    processes: Processes, uninterrupted: tuple[Path, dict[str, int]], tmp_path: Path, place: str, seed: int
) -> None:
    reference, moments = uninterrupted
    kill_and_resume(processes, tmp_path, moments, place, seed)
    assert_same(tmp_path / "run", reference)
