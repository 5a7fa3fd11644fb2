"""Runs that would die and recover instead; on one process and on two, and across a stop in the middle."""

import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from tests.support.comparing import assert_equal
from tests.support.recovering import RECOVERING, ROLLBACK, TAKING_BACK, done, nan_gradient
from tests.support.runs import ROOT, TRAIN, Finished, assert_began, load, run, scalars, tiny_job, train

TAGS = ("train/loss", "optim/grad_norm", "optim/lr", "val/loss")


def bad_batch(first: int, num_steps: int) -> str:
    return f"+callbacks.bad={{_target_: tests.support.sabotage.BadBatch, first: {first}, num_steps: {num_steps}}}"


class SameWeights(L.Callback):
    """Fails unless all processes end with the same weights, bit for bit."""

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        mine = torch.cat([p.detach().flatten() for p in module.parameters()])
        others: Any = trainer.strategy.all_gather(mine)
        for other in others:
            torch.testing.assert_close(other, mine, rtol=0, atol=0, equal_nan=True)


def train_on_two(cwd: Path, *arguments: str, seconds: int = 150) -> Finished:
    """`python train.py ARGUMENTS` on two gloo processes; one that waits for the other in vain fails the test."""
    two = [
        "trainer.devices=2",
        "+trainer.strategy=ddp",
        f"+callbacks.same._target_={__name__}.SameWeights",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    process = subprocess.Popen(
        [sys.executable, str(TRAIN), *arguments, *two],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return Finished(process.returncode, out, err)


BAD_WEIGHTS = [*TAKING_BACK, "model.placement=postnorm"]
BAD_WEIGHTS += ["+callbacks.flip={_target_: tests.support.sabotage.FlipBit, step: 18, parameter: head.weight}"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run(tmp_path_factory.mktemp("uninterrupted"), "run", *RECOVERING)
    assert done(folder) == {
        18: "skipped the step",
        19: "rolled back to step 10, learning rate x 0.5 to step 31",
    }
    return folder


def test_the_clock_the_data_and_the_schedule_go_on(uninterrupted: Path, tmp_path: Path) -> None:
    """The learning rate is that of a run without a fault, but for the cut; the data are the same, step by step."""
    clean = run(tmp_path, "run", *[o for o in RECOVERING if not o.startswith("+callbacks.nan")])
    cut = {step: 0.5 if 20 <= step + 1 <= 31 else 1.0 for step in range(40)}
    ours, theirs = scalars(uninterrupted, "optim/lr"), scalars(clean, "optim/lr")
    assert ours == pytest.approx({step: lr * cut[step] for step, lr in theirs.items()}, rel=1e-6)
    ours, theirs = (load(path / "checkpoints/last.ckpt") for path in (uninterrupted, clean))
    for part in ("lr_schedulers", "PythonStdlib", "global_step"):
        assert_equal(ours[part], theirs[part], part)
    assert {int(s["step"]) for s in ours["optimizer_states"][0]["state"].values()} == {40 - 9}, "10 to 19 are undone"


def test_going_back_does_not_look_like_an_update(uninterrupted: Path) -> None:
    """That of the step before is logged; after the rollback before step 19's update, step 20 has none to tell of."""
    logged = set(scalars(uninterrupted, "gradients/block_1/attn_out"))
    assert logged - set(scalars(uninterrupted, "updates/block_1/attn_out")) == {min(logged), min(logged) + 19}


def stopped_and_resumed(cwd: Path, job: list[str], step: int) -> Path:
    """Interrupted after this step, then gone on with."""
    interrupt = f"+callbacks.interrupt={{_target_: tests.support.signals.SendSignal, signum: 2, step: {step}}}"
    interrupted = train(cwd, *tiny_job(*job), "run_dir=run", interrupt)
    assert interrupted.code == 130
    assert train(cwd, *shlex.split(interrupted.out.splitlines()[-1])[2:]).code == 0
    assert_began(cwd / "run", step)
    return cwd / "run"


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Curves, final weights and all that a further resumption would know, bit for bit."""
    assert done(ours) == done(theirs)
    for tag in TAGS:
        assert str(scalars(ours, tag)) == str(scalars(theirs, tag)), tag  # str: nan is nan
    mine, others = (load(path / "checkpoints/last.ckpt") for path in (ours, theirs))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "PythonStdlib"):
        assert_equal(mine[part], others[part], part)
    assert_equal(mine["callbacks"]["Divergence"], others["callbacks"]["Divergence"], "Divergence")


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(18, id="between skip and rollback"),
        pytest.param(20, id="after the rollback"),
        pytest.param(25, id="in the cut", marks=pytest.mark.slow),
        pytest.param(31, id="at its end"),
    ],
)
def test_a_stop_amid_a_recovery_changes_nothing(tmp_path: Path, uninterrupted: Path, step: int) -> None:
    assert_same_run(stopped_and_resumed(tmp_path, RECOVERING, step), uninterrupted)


def test_bad_weights_in_the_checkpoint_are_recovered_from(tmp_path: Path) -> None:
    """Stopped between skip and rollback, with a flipped bit: only the saved snapshots are from before it."""
    whole = run(tmp_path, "whole", *BAD_WEIGHTS)
    assert done(whole) == {18: "skipped the step", 19: "rolled back to step 10, learning rate x 0.5 to step 31"}
    assert_same_run(stopped_and_resumed(tmp_path, BAD_WEIGHTS, 18), whole)


def test_the_average_of_the_weights_goes_back_with_them(tmp_path: Path) -> None:
    """The flipped bit is in the average from step 18 on; so far back at 10, it has those of the steps from 19 on."""
    job = [*BAD_WEIGHTS, "callbacks=[default,ema]"]
    whole = run(tmp_path, "whole", *job)
    assert done(whole)[19] == "rolled back to step 10, learning rate x 0.5 to step 31"
    last = load(whole / "checkpoints/last.ckpt")
    assert last["averaging_state"]["n_averaged"] == 10 + 40 - 18
    averaged, current = (last[part]["model.head.weight"] for part in ("state_dict", "current_model_state"))
    assert averaged.abs().max() < 2 * current.abs().max()
    resumed = stopped_and_resumed(tmp_path, job, 18)
    assert_same_run(resumed, whole)
    ours = load(resumed / "checkpoints/last.ckpt")
    for part in ("current_model_state", "averaging_state"):
        assert_equal(ours[part], last[part], part)


@pytest.mark.slow
def test_bad_weights_in_the_checkpoint_are_recovered_from_on_two_processes(tmp_path: Path) -> None:
    assert train_on_two(tmp_path, *tiny_job(*BAD_WEIGHTS), "run_dir=whole").code == 0
    interrupt = "+callbacks.interrupt={_target_: tests.support.signals.SendSignal, signum: 2, step: 18}"
    train_on_two(tmp_path, *tiny_job(*BAD_WEIGHTS), "run_dir=run", interrupt)
    names = {path.name for path in (tmp_path / "run/checkpoints").glob("step_18/snapshots*")}
    assert names == {"snapshots-rank-0.pt", "snapshots-rank-1.pt"}
    assert train_on_two(tmp_path, *tiny_job(*BAD_WEIGHTS), "run_dir=run", "ckpt_path=last").code == 0
    assert_began(tmp_path / "run", 18)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_without_the_saved_snapshots_it_goes_back_to_the_checkpoint(tmp_path: Path) -> None:
    interrupt = "+callbacks.interrupt={_target_: tests.support.signals.SendSignal, signum: 2, step: 18}"
    interrupted = train(tmp_path, *tiny_job(*RECOVERING), "run_dir=run", interrupt)
    (tmp_path / "run/checkpoints/step_18/snapshots-rank-0.pt").unlink()
    assert train(tmp_path, *shlex.split(interrupted.out.splitlines()[-1])[2:]).code == 0
    assert done(tmp_path / "run")[19] == "rolled back to step 18, learning rate x 0.5 to step 31"


@pytest.mark.slow
def test_two_processes_act_as_one_also_where_only_one_of_them_is_hurt(tmp_path: Path, uninterrupted: Path) -> None:
    finished = train_on_two(tmp_path, *tiny_job(*RECOVERING), "run_dir=run")
    assert finished.code == 0, finished.err
    assert done(tmp_path / "run") == done(uninterrupted)
    assert list(scalars(tmp_path / "run", "val/loss").values())[-1] == pytest.approx(
        list(scalars(uninterrupted, "val/loss").values())[-1], rel=1e-3
    )
    records = sorted(path.name for path in (tmp_path / "run/flight_recorder").iterdir())
    assert records == [f"step_{step}_rank_{rank}.pt" for step in (18, 19) for rank in (0, 1)]


POSTNORM = [
    "model.placement=postnorm",
    "model.num_layers=4",
    "model.dim=64",
    "data.batch_size=16",
    "data.val_batches=8",
]
POSTNORM += ["model.ffn_dim=null", "optim.warmup_steps=100", "trainer.max_steps=300", "trainer.val_check_interval=300"]
DEADLY, GENTLE = "optim.lr=3e-2", "callbacks.divergence.policy_options={lr_factor: 0.3, cooldown: 200}"
FLIPPED = (
    "+callbacks.flip={_target_: tests.support.sabotage.FlipBit, step: 110, parameter: blocks.1.attn.o_proj.weight}"
)
FULL_SPEED = "callbacks.divergence.policy_options={lr_factor: 1.0}"
POISON = [bad_batch(120, 4), nan_gradient(200, 3)]
CLEAN = [*POSTNORM, "optim.lr=3e-3"]
CASES = {  # (the run that dies, what makes it recover, how much above the clean run's loss it may end)
    "a learning rate that kills": ([*POSTNORM, DEADLY], [ROLLBACK, GENTLE], 0.1),  # how soon it is cut is by rounding
    "poison": ([*CLEAN, *POISON], [ROLLBACK], 0.02),
    "a flipped bit": ([*CLEAN, FLIPPED], [ROLLBACK, FULL_SPEED], 0.05),  # it loses 17 of 300 steps of training
}


def end(folder: Path) -> float:
    """Mean training loss of the last 20 steps."""
    return statistics.mean(list(scalars(folder, "train/loss").values())[-20:])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("processes", [1, 2])
def test_with_rollback_it_ends_like_the_clean_run_and_without_it_dies(
    case: str, processes: int, tmp_path: Path
) -> None:
    deadly, cure, tolerance = CASES[case]
    folders = {}
    for name, overrides in {"clean": CLEAN, "dead": deadly, "cured": [*deadly, *cure]}.items():
        arguments = [*tiny_job(*overrides), f"run_dir={name}"]
        finished = train(tmp_path, *arguments) if processes == 1 else train_on_two(tmp_path, *arguments, seconds=280)
        assert finished.code == 0, finished.err
        folders[name] = tmp_path / name
    ends = {name: end(folder) for name, folder in folders.items()}
    assert math.isnan(ends["dead"]) or ends["dead"] > 1.3 * ends["clean"]
    assert ends["cured"] <= (1 + tolerance) * ends["clean"]
