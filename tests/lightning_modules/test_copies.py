"""A module can be copied and pickled, whatever it is made of, and the copy is another model with the same function."""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_modules.language_module import LanguageModule
from spannorm import PLACEMENTS
from tests.support.fitting import fit
from tests.support.megablocks_cpu import megablocks_on_cpu
from tests.support.models import make_module, tokens

MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "tied": {"tie_embeddings": True},
    "loop": {"ffn": "moe", "moe": {"backend": "loop", "num_shared_experts": 1}},
    "grouped": {"ffn": "moe", "moe": {"backend": "grouped"}},
    "megablocks": {"ffn": "moe", "moe": {"backend": "megablocks", "num_experts": 6}},
    "biased": {"ffn": "moe", "moe": {"balancing": "bias", "score": "sigmoid"}},
    "compiled dense": {"compile": True},
    "compiled mixture": {"ffn": "moe", "compile": True},
    **{name: {"placement": name, "ffn": "moe", "norm": "layernorm"} for name in PLACEMENTS},
    "dyt": {"norm": "dyt"},
    "derf": {"norm": "derf"},
    "gatednorm": {"norm": "gatednorm", "placement": "subln"},
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


@pytest.fixture(params=MODELS)
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[LanguageModule]:
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))  # needs no compiler
    with megablocks_on_cpu() if request.param == "megablocks" else nullcontext():
        yield make_module(**MODELS[request.param])


def loss(module: LanguageModule, sequence: torch.Tensor) -> torch.Tensor:
    logits, router_stats = module(sequence)
    total: torch.Tensor = logits.square().mean() + sum(stats.z_loss for stats in router_stats)
    return total


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # read by the tracer itself
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_has_the_same_function_and_gradients_and_shares_nothing(module: LanguageModule, way: str) -> None:
    other, sequence = COPIES[way](module), tokens(2, 8)
    ours, theirs = dict(module.named_parameters()), dict(other.named_parameters())
    assert list(ours) == list(theirs)
    assert list(module.state_dict()) == list(other.state_dict())
    value = loss(module, sequence)
    value.backward()
    loss(other, sequence).backward()
    for name, parameter in ours.items():
        assert parameter.grad is not None
        close = {"atol": 1e-6, "rtol": 1e-4} if module.model_config.compile else {"atol": 0.0, "rtol": 0.0}
        torch.testing.assert_close(theirs[name].grad, parameter.grad, **close)  # the copy is not compiled
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(loss(module, sequence), value)


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_what_has_been_trained_is_copied_without_its_trainer_and_trains_on(ffn: str, way: str, tmp_path: Path) -> None:
    module, batches = make_module(ffn=ffn), [tokens(2, 9) for _ in range(3)]
    fit(tmp_path, module, *batches, max_steps=2)
    other = COPIES[way](module)
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"):
        _ = other.trainer
    for one in (module, other):
        torch.manual_seed(1)
        fit(tmp_path, one, *batches, max_steps=3)
    for parameter, copied in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, copied)
