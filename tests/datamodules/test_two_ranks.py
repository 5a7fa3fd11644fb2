"""Two real processes under the Trainer train on what one does, from here and from elsewhere, also after a stop."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.processes import together
from tests.support.servers import http_server, s3_server
from tests.support.two_ranks import LR, NUM_SAMPLES, STEPS, Job, make_corpus, record, run

# What a run is resumed from: whole at an epoch's end; and the two that a run left which died after 5 batches, half a
# step: one saved before that step, and one amid it.
STOPS = {"6": 3, "killed-4": 2, "killed-5": 2}  # optimizer steps that are in the weights
NUMBERS = {"one": 1, "two": 2}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Of the corpus: [NUM_SAMPLES, SEQ_LEN + 1]."""
    return make_corpus(tmp_path_factory.getbasetemp() / "two_ranks")


@pytest.fixture(scope="module")
def folder(samples: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs are."""
    folder, corpus = tmp_path_factory.mktemp("runs"), tmp_path_factory.getbasetemp() / "two_ranks"
    here = str(corpus)
    for name, number in NUMBERS.items():
        killed = Job(f"{name}-killed", here, number, saves=(4, 5), dies=True)
        assert together(number, folder, run, [killed]) == [[]] * number
    run(folder, Job("one", here, saves=(6,)))
    with http_server(corpus) as http, s3_server(corpus) as s3:
        jobs = [
            Job("two", here, 2, saves=(6,)),
            Job("http", http.address, 2),
            Job("s3", s3.address, 2, environment=tuple(s3.environment.items())),
            *(Job(f"after-one-{stop}", here, 2, resumes=f"one-{stop}") for stop in STOPS),
        ]
        assert together(2, folder, run, jobs) == [[None] * len(jobs)] * 2
    for stop in STOPS:
        run(folder, Job(f"after-two-{stop}", here, resumes=f"two-{stop}"))
    sizes = {path.name: path.stat().st_size for path in corpus.glob("train-*.npy")}
    assert {name: http.fetched[name] for name in sizes} == sizes, "the ranks share a cache: each byte came once"
    assert {s3.fetched[name] for name in sizes} == {1}
    return folder


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def test_one_process_sees_every_sample_once_an_epoch(folder: Path, samples: np.ndarray) -> None:
    steps, weight = record(folder, "one", 1)
    assert len(steps) == STEPS
    first, second = torch.cat(steps).flatten(0, 1).split(NUM_SAMPLES)
    assert sorted(first.tolist()) == sorted(second.tolist()) == sorted(samples.tolist())
    assert not torch.equal(first, second)
    assert weight == pytest.approx(-LR * STEPS * samples.mean(), rel=1e-5)


@pytest.mark.parametrize("name", ["two", "http", "s3"])
def test_two_ranks_train_on_the_same_global_batches(folder: Path, name: str) -> None:
    ours, one = record(folder, name, 2), record(folder, "one", 1)
    assert equal(ours.steps, one.steps)
    assert ours.weight == pytest.approx(one.weight, rel=1e-5)


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize(("before", "after"), [("one", "two"), ("two", "one")])
def test_after_a_stop_nothing_is_missed_and_nothing_comes_twice(
    folder: Path, before: str, after: str, stop: str
) -> None:
    """In steps, each of a whole accumulation: those in the weights of the checkpoint, then those of the resumed run."""
    stopped = record(folder, before if stop == "6" else f"{before}-killed", NUMBERS[before])
    resumed, one = record(folder, f"after-{before}-{stop}", NUMBERS[after]), record(folder, "one", 1)
    assert equal(stopped.steps[: STOPS[stop]] + resumed.steps, one.steps)
    assert resumed.weight == pytest.approx(one.weight, rel=1e-5)


def test_a_step_may_be_made_of_other_batches_after_a_stop(folder: Path, tmp_path: Path) -> None:
    """As many samples in one batch as before in two: what another number of devices, or their memory, asks for."""
    here = str(folder.parent / "two_ranks")
    run(tmp_path, Job("wide", here, saves=(3,), batch_size=8, accumulate=1))
    run(tmp_path, Job("narrow", here, resumes="wide-3"))
    wide, narrow = record(tmp_path, "wide", 1), record(tmp_path, "narrow", 1)
    assert equal([step.flatten(0, 1) for step in narrow.steps], [step.flatten(0, 1) for step in wide.steps[3:]])
    assert narrow.weight == pytest.approx(wide.weight, rel=1e-5)
