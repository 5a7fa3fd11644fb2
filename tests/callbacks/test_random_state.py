"""The generators' state goes with the checkpoint."""

from typing import Any
from unittest import mock

import torch

from callbacks.random_state import RandomState

NOTHING: Any = None


def test_what_is_drawn_after_a_resume_is_what_would_have_been_drawn() -> None:
    state = RandomState().state_dict()
    expected = torch.rand(3)
    resumed = RandomState()
    resumed.load_state_dict(state)
    resumed.on_train_start(NOTHING, NOTHING)
    assert torch.equal(torch.rand(3), expected)
    resumed.on_train_start(NOTHING, NOTHING)  # a second fit does not go back again
    assert not torch.equal(torch.rand(3), expected)


def test_a_new_run_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    RandomState().on_train_start(NOTHING, NOTHING)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_process_gets_back_its_own_generator() -> None:
    """As the second of two processes has it; a third one, which was not there, keeps its own."""
    first, second = (torch.Generator().manual_seed(seed).get_state() for seed in (1, 2))
    for rank, expected in ((0, first), (1, second), (2, torch.get_rng_state())):
        resumed = RandomState()
        resumed.load_state_dict({"ranks": [{"cpu": first}, {"cpu": second}]})
        before = torch.get_rng_state()
        with (
            mock.patch("torch.distributed.is_initialized", return_value=True),
            mock.patch("torch.distributed.get_rank", return_value=rank),
        ):
            resumed.on_train_start(NOTHING, NOTHING)
        assert torch.equal(torch.get_rng_state(), expected)
        torch.set_rng_state(before)
