"""When last.ckpt is written; tests/core/test_run_control.py has the signals, tests/test_train.py resumes real runs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from callbacks.checkpointing.last_checkpoint import LastCheckpoint
from callbacks.protocols import KeepsBeside
from core.errors import ConfigError
from core.run_control import SavesBeforeLeaving

NOTHING: Any = None


class Trainer:
    """Notes at which step it was asked to save."""

    def __init__(self) -> None:
        self.world_size, self.global_step, self.max_steps, self.accumulate_grad_batches = 1, 0, 100, 2
        self.should_stop = self.sanity_checking = self.is_last_batch = False
        self.saved: list[int] = []
        self.strategy = SimpleNamespace()
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


def test_the_last_step_is_saved_behind_its_validation(tmp_path: Path) -> None:
    trainer = Trainer()
    trainer.max_steps = 4
    callback = LastCheckpoint(str(tmp_path), 4)
    train(callback, trainer, num_steps=4)
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


def test_it_saves_before_the_process_leaves_unless_the_step_is_saved(tmp_path: Path) -> None:
    trainer, callback = Trainer(), LastCheckpoint(str(tmp_path), 3)
    train(callback, trainer, num_steps=4)
    for _ in range(2):
        callback.save_before_leaving(trainer)  # type: ignore[arg-type]
    assert trainer.saved == [3, 4]


def test_what_others_keep_lies_beside_each_checkpoint_as_long_as_it_does(tmp_path: Path) -> None:
    trainer, callback = Trainer(), LastCheckpoint(str(tmp_path), 1)
    callback.keep_beside(lambda folder: folder.mkdir())
    train(callback, trainer, num_steps=5)
    assert trainer.saved == [1, 2, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_3", "step_4"]


def test_it_is_found_by_what_it_can_do(tmp_path: Path) -> None:
    callback = LastCheckpoint(str(tmp_path), 1)
    assert isinstance(callback, KeepsBeside)
    assert isinstance(callback, SavesBeforeLeaving)


def test_an_interval_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"every_n_train_steps=0 is not valid: expected an integer >= 1"):
        LastCheckpoint(str(tmp_path), 0)
