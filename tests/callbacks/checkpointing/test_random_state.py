"""The generators' state goes with the checkpoint."""

from types import SimpleNamespace
from typing import Any

import torch

from callbacks.checkpointing.random_state import RandomState

NOTHING: Any = None


def process(rank: int, world_size: int, cut: int = 1) -> Any:
    """What a Trainer says of it."""
    strategy = SimpleNamespace(tensor_parallel_size=cut)
    return SimpleNamespace(global_rank=rank, world_size=world_size, strategy=strategy)


ALONE = process(0, 1)


def test_what_is_drawn_after_a_resume_is_what_would_have_been_drawn() -> None:
    state = RandomState().state_dict()
    expected = torch.rand(3)
    resumed = RandomState()
    resumed.load_state_dict(state)
    resumed.on_train_start(ALONE, NOTHING)
    assert torch.equal(torch.rand(3), expected)
    resumed.on_train_start(ALONE, NOTHING)  # a second fit does not go back again
    assert not torch.equal(torch.rand(3), expected)


def test_a_checkpoint_of_before_is_resumed() -> None:
    """Its generators were saved by process."""
    state = RandomState().state_dict()
    expected = torch.rand(3)
    resumed = RandomState()
    resumed.load_state_dict({"ranks": state["parts"]})
    resumed.on_train_start(ALONE, NOTHING)
    assert torch.equal(torch.rand(3), expected)


def test_a_new_run_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    RandomState().on_train_start(ALONE, NOTHING)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_part_of_the_batch_gets_back_its_own_generator() -> None:
    """By all who cut the model for it; a third one, which was not there, keeps its own."""
    first, second = (torch.Generator().manual_seed(seed).get_state() for seed in (1, 2))
    own = torch.get_rng_state()
    for cut in (1, 2):
        for rank in range(3 * cut):
            resumed = RandomState()
            resumed.load_state_dict({"parts": [{"cpu": first}, {"cpu": second}]})
            resumed.on_train_start(process(rank, 3 * cut, cut), NOTHING)
            assert torch.equal(torch.get_rng_state(), (first, second, own)[rank // cut])
            torch.set_rng_state(own)
