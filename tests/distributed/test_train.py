"""train.py on two gloo processes that share a model: interrupted, killed, diverging, misconfigured."""

import signal
import time
from pathlib import Path

import pytest

from core.checkpoint import load, load_beside_weights
from core.cli import DIVERGED, USER_ERROR
from core.event_files import event_files
from core.interruption import PEER_LOST
from core.run_folder import folder_name
from tests.support.comparing import assert_equal
from tests.support.processes import command_line, together
from tests.support.recovering import RECOVERING, done
from tests.support.runs import assert_began, run, scalars, tiny_job

TWO = ["trainer=fsdp", "trainer.devices=2"]
JITTER = ["experiment=moe_spannorm", "model.moe.jitter=0.1", "trainer.max_steps=6", "trainer.val_check_interval=3"]
JITTER += ["+callbacks.own._target_=tests.support.rank_faults.OwnNumbers"]
NAN = "+callbacks.nan={_target_: tests.support.sabotage.NaNGradient, first: 2}"


def job(run_dir: str, *arguments: str) -> list[str]:
    return [*tiny_job(*TWO, *arguments), f"run_dir={run_dir}"]


def assert_same(ours: Path, theirs: Path, at: int) -> None:
    """It went on at that step as the other one had, bit for bit."""
    assert_began(ours, at)
    for tag in ("train/loss", "val/loss", "optim/grad_norm", "updates/block_1/attn_out"):
        assert scalars(ours, tag) == scalars(theirs, tag), tag
    mine, others = (load(path / "checkpoints/last.ckpt") for path in (ours, theirs))
    for part in ("state_dict", "optimizer_0", "lr_schedulers", "PythonStdlib"):
        assert_equal(mine[part], others[part], part)
    assert_equal(mine["callbacks"]["RandomState"], others["callbacks"]["RandomState"], "RandomState")
    first, second = mine["callbacks"]["RandomState"]["parts"]
    assert not first["cpu"].equal(second["cpu"])


@pytest.mark.slow
def test_the_end_of_a_run_is_the_same_on_both(tmp_path: Path) -> None:
    interrupt = f"{{_target_: tests.support.rank_faults.SignalLast, signum: {int(signal.SIGUSR1)}, step: 4}}"
    cases = [
        (0, job("whole", *JITTER)),
        (128 + signal.SIGUSR1, job("stopped", *JITTER, f"+callbacks.interrupt={interrupt}")),
        (0, job("stopped", *JITTER, "ckpt_path=last")),
        (DIVERGED, job("diverged", "callbacks.divergence.policy=stop", NAN)),
        (USER_ERROR, job("odd", "data.batch_size=3")),
        (USER_ERROR, job("micro", "micro_batch_size=3")),
        (USER_ERROR, job("cut", "trainer.strategy.tensor_parallel_size=3")),
    ]
    codes = [code for code, _ in cases]
    both = together(2, tmp_path, command_line, [arguments for _, arguments in cases])
    assert [[finished.code for finished in rank] for rank in both] == [codes, codes], both

    message, resume = both[0][1].out.splitlines()[-2:]
    assert message == "Interrupted: SIGUSR1 after step 4. Saved; go on with"
    assert resume.endswith("ckpt_path=last")
    assert_same(tmp_path / "stopped", tmp_path / "whole", at=4)

    assert "2 or 4" in both[0][4].err
    assert "one of [1, 2]" in both[0][5].err
    assert "tensor_parallel_size=3 is not valid: expected a divisor of 2" in both[0][6].err
    assert not any((tmp_path / name).exists() for name in ("odd", "micro", "cut"))


def test_both_write_into_the_folder_that_the_first_one_has_got(tmp_path: Path) -> None:
    """The name that each would give it, in any of the next seconds, is another run's already."""
    arguments = tiny_job(*TWO, NAN, "trainer.max_steps=3")
    taken = {tmp_path / "runs/default" / folder_name(now, arguments) for now in _next_seconds(180)}
    for folder in taken:
        folder.mkdir(parents=True)
    both = together(2, tmp_path, command_line, [arguments])
    assert [finished.code for (finished,) in both] == [3, 3], both
    (ours,) = set((tmp_path / "runs/default").iterdir()) - taken
    assert not any(any(folder.iterdir()) for folder in taken)
    assert {path.name for path in ours.iterdir()} >= {"checkpoints", "config.yaml", "flight_recorder", "summary.json"}
    assert event_files(ours)


def _next_seconds(number: int) -> list[str]:
    now = time.time()
    return [time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(now + seconds)) for seconds in range(number)]


@pytest.mark.slow
def test_a_sharded_run_is_taken_back_as_one_process_is(tmp_path: Path) -> None:
    ((finished,), _) = together(2, tmp_path, command_line, [job("recovered", *RECOVERING)])
    assert finished.code == 0, finished.err
    alone = run(tmp_path, "alone", *RECOVERING)
    assert done(tmp_path / "recovered") == done(alone)
    assert "rolled back to step 10" in done(alone)[19]
    ours, theirs = (scalars(folder, "val/loss") for folder in (tmp_path / "recovered", alone))
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_when_one_is_killed_the_other_says_so_and_the_run_goes_on(tmp_path: Path, asynchronous: bool) -> None:
    options = ["experiment=dense_spannorm", "optim.schedule=constant", "trainer.max_steps=6"]
    options += ["callbacks.last_checkpoint.every_n_train_steps=2", f"trainer.strategy.asynchronous={asynchronous}"]
    kill = "+callbacks.kill={_target_: tests.support.rank_faults.KillLast, step: 6}"
    ((finished,), gone) = together(2, tmp_path, command_line, [job("run", *options, kill)])
    assert gone == []
    assert finished.code == PEER_LOST
    assert "Process 0 stops: another one is gone" in finished.err
    assert finished.err.splitlines()[-1].endswith("run_dir=run ckpt_path=last")

    saved = load_beside_weights(tmp_path / "run/checkpoints/last.ckpt")["global_step"]
    assert saved in ((2, 4) if asynchronous else (4,)), "the last one, or the one before if it was still being written"
    alone = ["experiment=dense_spannorm", "optim.schedule=constant", "trainer.max_steps=6"]
    run(tmp_path, "run", *alone, "ckpt_path=last")
    assert_began(tmp_path / "run", saved)
    whole = scalars(run(tmp_path, "whole", *alone), "train/loss")
    assert scalars(tmp_path / "run", "train/loss") == pytest.approx(whole, rel=1e-5)
