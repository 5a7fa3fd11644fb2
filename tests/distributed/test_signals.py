"""Signals to all processes at once: all save first, and none leaves while another one has something to do."""

import signal
from pathlib import Path

import pytest

from core.checkpoint import load_beside_weights
from tests.support.processes import command_line, together, under_slurm
from tests.support.runs import assert_began, run, scalars, tiny_job

STEPS = ["experiment=dense_spannorm", "optim.schedule=constant", "trainer.max_steps=4"]
STEPS += ["trainer.accumulate_grad_batches=8"]
WORKERS = "data.num_workers=2"  # a step is more than what these have in stock


def signals(*numbers: int) -> str:
    """To all, amid step 2; also to the processes of data loaders."""
    listed = ", ".join(str(int(number)) for number in numbers)
    return f"+callbacks.signals={{_target_: tests.support.rank_faults.SignalAll, signals: [{listed}], step: 2}}"


def job(run_dir: str, *arguments: str) -> list[str]:
    return [*tiny_job("trainer=fsdp", "trainer.devices=2", *STEPS, *arguments), f"run_dir={run_dir}"]


def test_all_save_and_leave_with_the_code(tmp_path: Path) -> None:
    # Upon SIGUSR1, SIGTERM when the time is up; from torchrun and SLURM, each a SIGTERM.
    cases = [
        (signal.SIGUSR1, job("late", WORKERS, signals(signal.SIGUSR1, signal.SIGTERM))),
        (signal.SIGTERM, job("twice", signals(signal.SIGTERM, signal.SIGTERM))),
        (signal.SIGTERM, [*job("whole", signals(signal.SIGTERM)), "trainer=ddp"]),
    ]
    both = together(2, tmp_path, command_line, [arguments for _, arguments in cases])
    for case, first, second in zip(cases, *both, strict=True):
        assert first.code == second.code == 128 + case[0], first.err + second.err
        assert f"Interrupted: {case[0].name} after step 2. Saved" in first.out
    for name in ("late", "twice", "whole"):
        assert load_beside_weights(tmp_path / name / "checkpoints/last.ckpt")["global_step"] == 2


@pytest.mark.slow
def test_a_slurm_job_saves_is_requeued_and_goes_on(tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\nsleep 1\necho "$@" > {tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    slow = "+callbacks.slow._target_=tests.support.rank_faults.SlowRename"
    stopped = job("run", "trainer=slurm", WORKERS, signals(signal.SIGUSR1), slow)
    going_on = job("run", "trainer=slurm", WORKERS, "ckpt_path=last")
    arguments = [[option for option in case if option != "trainer.devices=2"] for case in (stopped, going_on)]
    for (interrupted, requeued), (resumed, _) in together(2, tmp_path, under_slurm, arguments):
        assert interrupted.code == 128 + signal.SIGUSR1, interrupted.err
        assert requeued, "before any process left"
        assert resumed.code == 0, resumed.err
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert_began(tmp_path / "run", 2)
    whole = scalars(run(tmp_path, "whole", *STEPS), "train/loss")
    assert scalars(tmp_path / "run", "train/loss") == pytest.approx(whole, rel=1e-5)
