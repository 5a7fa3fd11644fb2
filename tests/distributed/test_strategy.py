"""What a failed save is called, that the first error is not lost over it, and how long processes wait."""

from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from lightning_modules.strategy import DataParallelStrategy, ShardedStrategy


def failing(*failures: BaseException) -> ShardedStrategy:
    """One whose save has failed in processes 0, 1, ..."""
    strategy = ShardedStrategy()
    strategy._saving = Future()
    by_rank = {rank: (failure, None) for rank, failure in enumerate(failures)}
    strategy._saving.set_exception(CheckpointException("write", by_rank))  # type: ignore[arg-type]
    return strategy


def test_torchs_error_becomes_one_that_says_where_and_why() -> None:
    strategy = failing(ValueError("no such\nplanner"), KeyError("weight"))
    with pytest.raises(RuntimeError, match=r"not saved \(process 0: no such planner; process 1: 'weight'\)") as error:
        strategy.finish_saving()
    assert isinstance(error.value.__cause__, CheckpointException)
    strategy.finish_saving()  # is said once


def test_what_the_system_refuses_stays_its_own_error() -> None:
    with pytest.raises(OSError, match="No space left on device") as error:
        failing(OSError(28, "No space left on device")).finish_saving()
    assert error.value.errno == 28


def test_a_checkpoint_waits_for_the_one_before(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left on device"):
        failing(OSError(28, "No space left on device")).save_checkpoint({"state_dict": {}}, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("strategy", [DataParallelStrategy, ShardedStrategy])
def test_lightning_is_told_how_long_to_wait(strategy: Any) -> None:
    assert strategy(timeout_minutes=0.5)._timeout == timedelta(seconds=30)
    assert strategy()._timeout == timedelta(minutes=10)
