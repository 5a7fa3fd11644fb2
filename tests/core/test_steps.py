"""Optimizer steps as against batches."""

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from core.errors import ConfigError
from core.steps import check_length, completes_step, is_logged, num_batches


def trainer(**values: Any) -> Any:
    defaults = {
        "max_steps": 10,
        "max_epochs": -1,
        "min_epochs": None,
        "fit_loop": SimpleNamespace(),
        "accumulate_grad_batches": 3,
        "is_last_batch": False,
        "log_every_n_steps": 4,
        "val_check_interval": 6,
        "limit_train_batches": 1.0,
        "fast_dev_run": False,
        "gradient_clip_val": 1.0,
    }
    return SimpleNamespace(**{**defaults, **values})


def test_the_last_of_the_accumulated_batches_completes_the_step() -> None:
    assert [index for index in range(9) if completes_step(trainer(), index)] == [2, 5, 8]


def test_the_last_batch_of_an_epoch_completes_a_step_too() -> None:
    assert completes_step(trainer(is_last_batch=True), 0), "Lightning steps with the remainder"


def test_every_nth_step_is_logged_and_the_last() -> None:
    assert [step for step in range(1, 11) if is_logged(trainer(), step)] == [4, 8, 10]
    assert [step for step in range(1, 11) if is_logged(trainer(log_every_n_steps=0), step)] == [10]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_steps", -1),
        ("max_steps", 0),
        ("max_epochs", 3),
        ("min_epochs", 1),
        ("accumulate_grad_batches", 0),
        ("val_check_interval", 7),
        ("val_check_interval", 0),
        ("val_check_interval", 1.0),
        ("val_check_interval", None),
        ("gradient_clip_val", -1.0),
        ("gradient_clip_val", float("inf")),
        ("log_every_n_steps", -1),
    ],
)
def test_a_run_without_an_end_or_with_half_steps_is_refused(field: str, value: Any) -> None:
    check_length(trainer())
    with pytest.raises(ConfigError) as error:
        check_length(trainer(**{field: value}))
    assert error.value.field == f"trainer.{field}"
    check_length(trainer(**{field: value}, fast_dev_run=True))


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 1.0])
@pytest.mark.parametrize("scheduling", [{0: 1}, {0: 3}, {0: 2, 1: 1}, {0: 1, 1: 3, 2: 2}, {2: 3}], ids=str)
def test_batches_are_counted_as_the_steps_are_made_of_them(scheduling: dict[int, int], limit: float) -> None:
    """Against a loop over batches that steps where Lightning does."""
    callback = GradientAccumulationScheduler(scheduling)
    stepped, batches, epoch = [0], 0, 0
    while len(stepped) < 30:
        size = callback.get_accumulate_grad_batches(epoch)
        last = limit if isinstance(limit, int) else 1000
        for number in range(1, last + 1):
            batches += 1
            if number % size == 0 or number == last:
                stepped.append(batches)
        epoch += 1
    own = trainer(callbacks=[callback], limit_train_batches=limit)
    assert [num_batches(own, steps) for steps in range(30)] == stepped[:30]
