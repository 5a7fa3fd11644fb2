"""Sampling: greedy against a loop written here, frequencies against probabilities, and no side effects."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.generation import generate
from lightning_modules.transformer import Transformer
from tests.conftest import VOCAB_SIZE, make_module, tiny_config, tokens


def make_model() -> Transformer:
    model = Transformer(tiny_config(), VOCAB_SIZE)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("window", [100, 3])
def test_greedy_is_argmax_over_the_window(window: int) -> None:
    model, prompt = make_model(), tokens(5)
    expected = prompt.tolist()
    for _ in range(12):
        logits, _ = model(torch.tensor([expected[-window:]]))
        expected.append(int(logits[0, -1].argmax()))
    assert generate(model, prompt, 12, temperature=0, seed=0, window=window).tolist() == expected
    assert len(set(expected[5:])) > 1


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    model, prompt = make_model(), tokens(1)
    before = torch.random.get_rng_state()

    def sample(seed: int) -> list[int]:
        return generate(model, prompt, 20, temperature=2.0, seed=seed, window=100).tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert torch.equal(before, torch.random.get_rng_state())


class FixedLogits(nn.Module):
    """Says 1 : 2 : 4 whatever comes in."""

    def forward(self, batch: Tensor) -> tuple[Tensor, list[None]]:
        return torch.tensor([0.0, math.log(2), math.log(4)]).expand(*batch.shape, 3), []


@pytest.mark.parametrize(("temperature", "odds"), [(1.0, (1, 2, 4)), (0.5, (1, 4, 16)), (2.0, (1, 2**0.5, 2))])
def test_temperature_divides_the_logits(temperature: float, odds: tuple[float, ...]) -> None:
    drawn = generate(FixedLogits(), torch.tensor([0]), 3000, temperature, seed=0, window=1)[1:]  # type: ignore[arg-type]
    frequencies = drawn.bincount(minlength=3) / 3000
    expected = torch.tensor(odds) / sum(odds)
    torch.testing.assert_close(frequencies, expected, atol=0.03, rtol=0)  # 3 standard errors


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_comes_back_and_the_model_can_train_on(training: bool) -> None:
    module = make_module(ffn="moe", moe={"jitter": 0.5})
    module.train(training)
    first, second = (module.generate([1, 2], 8, temperature=0, seed=0, window=100) for _ in range(2))
    assert first == second  # jitter is off while it generates
    assert first[:2] == [1, 2]
    assert len(first) == 10
    assert all(child.training == training for child in module.model.modules())
    module(tokens(2, 5))[0].sum().backward()
    assert module.model.head.weight.grad is not None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_diverged_has_nothing_to_say(temperature: float) -> None:
    model = make_model().train()
    nn.init.constant_(model.head.weight, math.nan)
    with pytest.raises(ValueError, match="not finite"):
        generate(model, tokens(3), 2, temperature, seed=0, window=8)
    assert model.training
