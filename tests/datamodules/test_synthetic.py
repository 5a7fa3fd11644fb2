"""Tasks with a known optimum: what is drawn is what is said, and no predictor does better than the optimum."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import ConfigError
from datamodules.synthetic import Copy, Induction, Ngram, Synthetic
from tests.support.runs import run_on, scalars


def draw(task: Any, number: int) -> np.ndarray:
    return np.stack([task.draw(np.random.default_rng([0, n])) for n in range(number)])


def test_the_chain_is_what_its_table_says() -> None:
    task = Ngram(seq_len=40, vocab_size=5)
    rows = draw(task, 5000)
    counts = np.zeros((5, 5, 5))
    np.add.at(counts, (rows[:, :-2].ravel(), rows[:, 1:-1].ravel(), rows[:, 2:].ravel()), 1)
    often = counts.sum(2) > 1000
    assert often.sum() > 5
    found = counts / np.maximum(counts.sum(2, keepdims=True), 1)
    assert np.abs(found - task.transitions)[often].max() < 0.06
    for place in (0, 20):  # stationary from the first token on
        pairs = np.bincount(rows[:, place] * 5 + rows[:, place + 1], minlength=25) / len(rows)
        assert np.abs(pairs - task.pairs.ravel()).max() < 0.03


def test_the_chains_optimum_is_the_true_predictors_loss() -> None:
    task = Ngram(seq_len=10, vocab_size=4)
    rows = draw(task, 20_000)
    given_one = task.pairs / task.pairs.sum(1, keepdims=True)
    losses = [-np.log(given_one[rows[:, 0], rows[:, 1]])]
    losses += [-np.log(task.transitions[rows[:, t - 2], rows[:, t - 1], rows[:, t]]) for t in range(2, 11)]
    assert np.mean(losses) == pytest.approx(task.optimum(), rel=0.02)
    assert task.optimum() < math.log(4) / 1.5, "worth learning"


def test_the_second_half_is_the_first() -> None:
    rows = draw(Copy(seq_len=10, vocab_size=8), 100)
    assert rows.shape == (100, 11)
    assert (rows[:, 5] == 7).all()
    assert (rows[:, :5] == rows[:, 6:]).all()
    assert set(rows[:, :5].ravel()) == set(range(7))
    assert Copy(seq_len=10, vocab_size=8).optimum() == pytest.approx(4 * math.log(7) / 10)


def test_a_key_that_came_before_tells_its_value() -> None:
    task = Induction(seq_len=15, vocab_size=12)
    rows = draw(task, 200)
    for row in rows.tolist():
        first, second = list(zip(row[:8:2], row[1:8:2], strict=True)), list(zip(row[8::2], row[9::2], strict=True))
        assert sorted(first) == sorted(second)
        keys = [key for key, _ in first]
        assert len(set(keys)) == 4
        assert max(keys) < 6 <= min(value for _, value in first)
    assert len({tuple(row) for row in rows.tolist()}) == 200
    # 3 further keys of the 6, 4 values, 4 keys in any order, nothing for the values that are known
    expected = math.log(5 * 4 * 3) + 4 * math.log(6) + math.log(math.factorial(4))
    assert task.optimum() == pytest.approx(expected / 15)


def test_a_sample_depends_on_its_number_and_the_seed_alone() -> None:
    data = Synthetic("ngram", 8, seq_len=6, batch_size=4, seed=1)
    rows = data.samples("train").read(np.arange(50))["tokens"]
    np.testing.assert_array_equal(data.samples("train").read(np.array([7, 49]))["tokens"], rows[[7, 49]])
    other = Synthetic("ngram", 8, seq_len=6, batch_size=4, seed=2)
    assert not np.array_equal(other.samples("train").read(np.arange(50))["tokens"], rows)
    assert not np.array_equal(data.samples("val").read(np.arange(50))["tokens"], rows)
    np.testing.assert_array_equal(*(d.samples("val").read(np.arange(9))["tokens"] for d in (data, other)))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"task": "sort"}, "data.task"),
        ({"vocab_size": 2}, "data.vocab_size"),
        ({"vocab_size": 129}, "data.vocab_size"),
        ({"task": "copy", "seq_len": 7}, "data.seq_len"),
        ({"task": "induction", "seq_len": 8}, "data.seq_len"),
        ({"task": "induction", "seq_len": 19}, "data.seq_len"),
    ],
)
def test_what_has_no_such_task_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as error:
        Synthetic(**{"task": "ngram", "vocab_size": 8, "seq_len": 8, "batch_size": 2, **changes})
    assert error.value.field == field


def test_a_run_prints_the_optimum_and_comes_near_it(tmp_path: Path) -> None:
    task = ["data=synthetic", "data.vocab_size=4", "optim.lr=1e-2", "trainer.max_steps=60"]
    folder = run_on(tmp_path, "experiment=dense_prenorm", *task, "data.batch_size=16")
    optimum = Ngram(seq_len=32, vocab_size=4).optimum()
    (loss,) = scalars(folder, "val/loss").values()
    assert 0.97 * optimum < loss < 0.5 * optimum + 0.5 * math.log(4)
