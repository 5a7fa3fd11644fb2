"""The generators' state goes with the checkpoint."""

from typing import Any

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
