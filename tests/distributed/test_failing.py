"""What fails in one process ends all of them, with the same words; the first error is the one that is seen."""

from pathlib import Path

import pytest

from core.cli import USER_ERROR
from tests.support.processes import command_line, together
from tests.support.runs import tiny_job

EVERY = ["trainer.max_steps=4", "callbacks.last_checkpoint.every_n_train_steps=1", "trainer.devices=2"]
AT_THE_END = "callbacks.last_checkpoint.every_n_train_steps=200"
NO_RENAME = "+callbacks.fault._target_=tests.support.rank_faults.NoRename"
FAIL_ALL = "+callbacks.fail={_target_: tests.support.rank_faults.FailAll, step: 2}"


def small_files(rank: int, num_bytes: int) -> str:
    return f"+callbacks.fault={{_target_: tests.support.rank_faults.SmallFiles, rank: {rank}, num_bytes: {num_bytes}}}"


CASES = {
    "renamed beside training": ["trainer=fsdp", NO_RENAME],
    "renamed at the end": ["trainer=fsdp", NO_RENAME, "callbacks.best_checkpoint=null", AT_THE_END],
    "renamed": ["trainer=fsdp", NO_RENAME, "trainer.strategy.asynchronous=false"],
    "piece beside training": ["trainer=fsdp", small_files(1, 10_000)],
    "piece": ["trainer=fsdp", small_files(1, 10_000), "trainer.strategy.asynchronous=false"],
    "file": ["trainer=ddp", small_files(0, 300_000)],
}
REASON = {"renamed": "No space left on device", "piece": "File too large", "file": "File too large"}


@pytest.mark.slow
def test_a_checkpoint_that_one_cannot_write_ends_all_with_the_same_error(tmp_path: Path) -> None:
    jobs = [[*tiny_job(*EVERY, *options), f"run_dir={name.replace(' ', '_')}"] for name, options in CASES.items()]
    both = together(2, tmp_path, command_line, jobs)
    for name, first, second in zip(CASES, *both, strict=True):
        assert (first.code, second.code) == (USER_ERROR, USER_ERROR), f"{name}: {first.err} {second.err}"
        assert first.err == second.err, name
        assert REASON[name.split()[0]] in first.err, name


def test_the_first_error_is_seen_and_not_what_became_of_the_checkpoint(tmp_path: Path) -> None:
    arguments = [*tiny_job(*EVERY, "trainer=fsdp", NO_RENAME, FAIL_ALL), "run_dir=run"]
    ((first,), (second,)) = together(2, tmp_path, command_line, [arguments])
    assert first.code == second.code == USER_ERROR
    for finished in (first, second):
        assert finished.err.splitlines()[-1] == "Error: the first error"
    assert "The checkpoint that was being written is lost: [Errno 28]" in first.err
