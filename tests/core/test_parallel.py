"""How a batch is shared out: what a step, a validation and the intervals hold stays the same."""

import json
from pathlib import Path

import lightning as L
import pytest

from core.errors import ConfigError
from core.parallel import apply_micro_batching, num_passes
from tests.support.processes import QUIET
from tests.support.runs import TinyData, tiny_job, train


def test_a_step_a_validation_and_the_intervals_keep_their_sequences(tmp_path: Path) -> None:
    datamodule = TinyData(tmp_path, batch_size=4, val_batches=3)
    datamodule.prepare_data()
    counts = {"accumulate_grad_batches": 3, "val_check_interval": 6, "limit_val_batches": 2}
    trainer = L.Trainer(accelerator="cpu", max_steps=1, check_val_every_n_epoch=None, **counts, **QUIET)
    apply_micro_batching(trainer, datamodule, micro_batch_size=None)
    assert {name: getattr(trainer, name) for name in counts} == counts
    apply_micro_batching(trainer, datamodule, micro_batch_size=1)
    assert {name: getattr(trainer, name) for name in counts} == {name: 4 * count for name, count in counts.items()}
    assert (datamodule.batch_size, datamodule.num_val_batches) == (1, 12)
    assert trainer.limit_train_batches == 1.0, "all there is"


def test_fast_dev_run_makes_a_whole_step(tmp_path: Path) -> None:
    options = ["+trainer.fast_dev_run=true", "micro_batch_size=1", "run_dir=run"]
    finished = train(tmp_path, *tiny_job("experiment=dense_spannorm", *options))
    assert finished.code == 0, finished.err
    assert json.loads((tmp_path / "run/summary.json").read_text())["tokens"] == 4 * 32


@pytest.mark.parametrize(
    ("world", "cut", "batch_size", "micro_batch_size", "passes"),
    [
        (1, 1, 8, None, 1),
        (8, 1, 8, None, 1),
        (1, 1, 8, 2, 4),
        (2, 1, 8, 2, 2),
        (4, 1, 8, 2, 1),
        (8, 2, 8, 1, 2),
        (8, 8, 8, 4, 2),
        (3, 1, None, 5, 1),
    ],
)
def test_passes_follow_from_the_processes_that_share_the_data(
    world: int, cut: int, batch_size: int | None, micro_batch_size: int | None, passes: int
) -> None:
    assert num_passes(world, cut, batch_size, micro_batch_size) == passes


@pytest.mark.parametrize(
    ("world", "cut", "batch_size", "micro_batch_size", "message"),
    [
        (4, 1, 6, None, r"data\.batch_size=6 .* a multiple of 4, the number of data-parallel processes .*: 4 or 8"),
        (8, 2, 6, None, r"data\.batch_size=6 .* a multiple of 4, .*: 4 or 8"),
        (4, 1, 3, None, r"trainer\.devices=4 .* at most 3 data-parallel processes .* data\.batch_size=3$"),
        (4, 3, 8, None, r"tensor_parallel_size=3 .* a divisor of 4"),
        (2, 1, 12, 4, r"micro_batch_size=4 .* one of \[1, 2, 3, 6\]: 2 data-parallel processes take 6 each"),
        (2, 1, 4, 4, r"micro_batch_size=4 .* one of \[1, 2\]"),
        (1, 1, 4, 0, r"micro_batch_size=0 .* one of \[1, 2, 4\]"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_with_what_can(
    world: int, cut: int, batch_size: int, micro_batch_size: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        num_passes(world, cut, batch_size, micro_batch_size)
