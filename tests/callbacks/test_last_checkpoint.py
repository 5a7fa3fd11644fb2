"""When last.ckpt is written, and by whose signal a run ends; tests/test_train.py resumes real runs."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from callbacks.last_checkpoint import LastCheckpoint
from core.errors import ConfigError
from core.interruption import TrainingInterrupted

NOTHING: Any = None


class Trainer:
    """Notes at which step it was asked to save."""

    def __init__(self, world_size: int = 1, other_rank: int = 0) -> None:
        self.world_size, self.global_step, self.max_steps, self.accumulate_grad_batches = world_size, 0, 100, 2
        progress = SimpleNamespace(total=SimpleNamespace(ready=0, started=0))
        self.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
        self.should_stop, self.sanity_checking, self.saved = False, False, []
        self.is_last_batch = False
        largest = lambda mine, reduce_op: torch.maximum(mine, torch.tensor(other_rank))  # noqa: E731
        self.strategy = SimpleNamespace(root_device="cpu", reduce=largest, barrier=lambda name: None)
        self.loggers, self.is_global_zero, self.local_rank, self.ckpt_path = [], True, 0, None

    def save_checkpoint(self, path: Path) -> None:
        self.saved.append(self.global_step)


def train(callback: LastCheckpoint, trainer: Any, num_steps: int) -> None:
    for batch in range(2 * num_steps):
        callback.on_train_batch_start(trainer, NOTHING, NOTHING, batch)
        trainer.global_step = (batch + 1) // 2
        callback.on_train_batch_end(trainer, NOTHING, NOTHING, NOTHING, batch)


def test_it_saves_every_n_steps_once(tmp_path: Path) -> None:
    trainer = Trainer()
    train(LastCheckpoint(str(tmp_path), 3), trainer, num_steps=7)
    assert trainer.saved == [3, 6]


def test_it_saves_once_its_validation_is_done(tmp_path: Path) -> None:
    trainer, callback = Trainer(), LastCheckpoint(str(tmp_path), 3)
    train(callback, trainer, num_steps=3)
    callback.on_validation_end(trainer, NOTHING)  # type: ignore[arg-type]
    assert trainer.saved == []
    callback.on_train_batch_start(trainer, NOTHING, NOTHING, 6)  # type: ignore[arg-type]
    assert trainer.saved == [3]


def test_the_last_step_asks_for_a_validation(tmp_path: Path) -> None:
    trainer = Trainer()
    trainer.max_steps = 4
    callback = LastCheckpoint(str(tmp_path), 4)
    train(callback, trainer, num_steps=4)
    assert trainer.should_stop
    assert trainer.saved == [], "the validation comes first"
    callback.on_validation_end(trainer, NOTHING)  # type: ignore[arg-type]
    assert trainer.saved == [4]
    callback.on_train_end(trainer, NOTHING)  # type: ignore[arg-type]
    assert trainer.saved == [4]


def test_without_a_validation_the_end_saves(tmp_path: Path) -> None:
    trainer, callback = Trainer(), LastCheckpoint(str(tmp_path), 3)
    train(callback, trainer, num_steps=4)
    callback.on_train_end(trainer, NOTHING)  # type: ignore[arg-type]
    assert trainer.saved == [3, 4]


@pytest.mark.parametrize("other_rank", [0, signal.SIGTERM])
def test_all_ranks_leave_after_the_step_in_which_one_got_a_signal(tmp_path: Path, other_rank: int) -> None:
    trainer, callback = Trainer(world_size=2, other_rank=other_rank), LastCheckpoint(str(tmp_path), 100)
    if not other_rank:
        train(callback, trainer, num_steps=3)
        assert trainer.saved == []
        return
    with pytest.raises(TrainingInterrupted) as interruption:
        train(callback, trainer, num_steps=3)
    assert trainer.saved == [1]
    assert (interruption.value.signum, interruption.value.step) == (signal.SIGTERM, 1)


def test_the_handlers_that_were_there_come_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    callback = LastCheckpoint(str(tmp_path), 1)
    callback.on_train_start(Trainer(), NOTHING)  # type: ignore[arg-type]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    callback.on_exception(NOTHING, NOTHING, KeyboardInterrupt())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_interval_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"every_n_train_steps=0 is not valid: expected an integer >= 1"):
        LastCheckpoint(str(tmp_path), 0)


def test_the_message_names_signal_and_step() -> None:
    assert str(TrainingInterrupted(signal.SIGTERM, 7)) == "SIGTERM after step 7"
