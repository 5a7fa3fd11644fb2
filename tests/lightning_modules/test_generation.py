"""Sampling: with a cache as without, bit for bit; greedy against a loop written here; frequencies against odds."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.errors import ConfigError
from lightning_modules.generation import choose, feed, generate, stream
from lightning_modules.layers.kv_cache import KVCache
from lightning_modules.transformer import Transformer
from spannorm import PLACEMENTS
from tests.support.models import VOCAB_SIZE, make_module, tiny_config, tokens

LENGTH = 48
SHARED = {"num_experts": 8, "num_shared_experts": 1, "first_dense_layers": 1, "balancing": "bias", "score": "sigmoid"}
MODELS: dict[str, dict[str, Any]] = {
    **{name: {"placement": name} for name in PLACEMENTS},
    **{f"{name}, moe": {"placement": name, "ffn": "moe"} for name in PLACEMENTS},
    # Of width 32 the gate would have rank 4, too few numbers for the same bits: lightning_modules/generation.py.
    **{
        f"gr{end}": {"placement": "gr", "placement_options": {"rank": 8}, **ffn}
        for end, ffn in (("", {}), (", moe", {"ffn": "moe"}))
    },
    "grouped queries": {"num_kv_heads": 2, "placement": "hybridnorm"},
    "norms on q and k": {"qk_norm": "width", "head_dim": 16, "num_kv_heads": 2},
    "norms on each head, biases": {"qk_norm": "head", "placement": "hybridnorm", "qkv_bias": True},
    "shared experts": {"ffn": "moe", "moe": SHARED},
    "layernorm, tied": {"norm": "layernorm", "tie_embeddings": True},
}


def make_model(**overrides: Any) -> Transformer:
    model = Transformer(tiny_config(**overrides), VOCAB_SIZE)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model.eval()


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
@torch.inference_mode()
def test_with_a_cache_the_logits_are_the_same_bit_for_bit(overrides: dict[str, Any]) -> None:
    """Those of model(text), the text filled up to the cache's length, which a causal model does not see."""
    model, text = make_model(**overrides), tokens(7).tolist()
    cache = KVCache(model.config.num_layers, LENGTH)
    cached = [feed(model, cache, [text], [0])[0, -1]]
    while len(text) < LENGTH - 1:
        text.append(int(cached[-1].argmax()))
        cached.append(feed(model, cache, [text[-1:]], [len(text) - 1])[0, -1])
    whole, _ = model(torch.tensor([[*text, 0]]))
    assert torch.equal(torch.stack(cached), whole[0, 6:-1])
    assert torch.stack(cached).std() > 0.1
    exact = model.double()  # not filled up it is another length, and another order of adding up
    whole, _ = exact(torch.tensor([[*text, 0]]))
    for end in (7, 20, LENGTH - 1):
        torch.testing.assert_close(exact(torch.tensor([text[:end]]))[0][0, -1], whole[0, end - 1])


def without_cache(model: Transformer, prompt: list[int], num_tokens: int, window: int) -> list[int]:
    text, new = prompt[-window:], []
    for _ in range(num_tokens):
        if len(text) > window:
            text = text[-max(1, window // 2) :]
        new.append(int(model(torch.tensor([text]))[0][0, -1].argmax()))
        text.append(new[-1])
    return new


@pytest.mark.parametrize("window", [100, 8, 3, 1])
def test_greedy_is_argmax_over_the_window(window: int) -> None:
    model, prompt = make_model(), tokens(5)
    expected = without_cache(model, prompt.tolist(), 40, window)
    assert generate(model, prompt, 40, temperature=0, seed=0, window=window).tolist() == [*prompt.tolist(), *expected]
    assert len(set(expected)) > 1


def side_by_side(model: Transformer, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    return [list(row) for row in zip(*stream(model, prompts, 24, **options), strict=True)]


@pytest.mark.parametrize("window", [64, 12])
def test_side_by_side_is_one_by_one(window: int) -> None:
    """Also where each text fills the window at a step of its own."""
    model, prompts = make_model(ffn="moe"), [tokens(n).tolist() for n in (9, 1, 4, 20)]
    together = side_by_side(model, prompts, temperature=0, seeds=[0] * 4, window=window)
    assert together == [without_cache(model, prompt, 24, window) for prompt in prompts]


def test_what_is_drawn_for_one_does_not_depend_on_those_beside_it() -> None:
    model, prompts = make_model(), [tokens(n).tolist() for n in (9, 1, 9, 4)]
    options: dict[str, Any] = {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "window": 12, "length": 12}
    together = side_by_side(model, prompts, seeds=[3, 4, 5, 6], **options)
    alone = [side_by_side(model, [prompt], seeds=[3 + n], **options)[0] for n, prompt in enumerate(prompts)]
    assert together == alone
    assert side_by_side(model, prompts[:1], seeds=[5], **options) != [together[0]], "the seed decides"


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    model, prompt = make_model(), tokens(1)
    before = torch.random.get_rng_state()

    def sample(seed: int) -> list[int]:
        return generate(model, prompt, 20, temperature=2.0, seed=seed, window=100).tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert torch.equal(before, torch.random.get_rng_state())


def drawn(logits: list[float], temperature: float, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
    """How often each token comes, as a fraction."""
    rows = torch.tensor(logits).expand(3000, -1)
    generators = [torch.Generator().manual_seed(0)] * len(rows)
    return choose(rows, temperature, top_k, top_p, generators).bincount(minlength=3) / 3000


@pytest.mark.parametrize(
    ("options", "odds"),
    [
        ({"temperature": 1.0}, (1, 2, 4)),
        ({"temperature": 0.5}, (1, 4, 16)),
        ({"temperature": 2.0}, (1, 2**0.5, 2)),
        ({"temperature": 0.0}, (0, 0, 1)),
        ({"temperature": 1.0, "top_k": 2}, (0, 2, 4)),
        ({"temperature": 1.0, "top_k": 9}, (1, 2, 4)),
        ({"temperature": 1.0, "top_p": 0.6}, (0, 2, 4)),  # 4/7 does not reach it, 6/7 does
        ({"temperature": 1.0, "top_p": 0.5}, (0, 0, 4)),
        ({"temperature": 0.5, "top_p": 0.8}, (0, 4, 16)),  # after the temperature: 16/21
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.65}, (0, 0, 4)),  # among those two: 4/6
    ],
)
def test_what_is_drawn_from(options: dict[str, Any], odds: tuple[float, ...]) -> None:
    frequencies = drawn([0.0, math.log(2), math.log(4)], **options)
    expected = torch.tensor(odds) / sum(odds)
    torch.testing.assert_close(frequencies, expected, atol=0.03, rtol=0)  # 3 standard errors
    assert torch.equal(frequencies == 0, expected == 0)


@pytest.mark.parametrize("temperature", [1e-30, 1e-39, 5e-324])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_smallest_temperature_takes_the_likeliest_token(temperature: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([[-3.0, 40.0, 39.0], [7.0, -2.0, 0.0]], dtype=dtype)
    generators = [torch.Generator().manual_seed(0)] * 2
    assert choose(logits, temperature, None, 1.0, generators).tolist() == [1, 0]


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


@pytest.mark.slow
def test_compiled_and_in_bfloat16_it_is_nearly_the_same() -> None:
    module = make_module(num_layers=1)
    module.model.blocks[0].compile(backend="aot_eager")
    prompt = tokens(5).tolist()
    module.model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        cache = KVCache(1, 8)
        feed(module.model, cache, [prompt[:3]], [0])
        cached = feed(module.model, cache, [prompt[3:]], [3])[0, -1]
        whole = module.model(torch.tensor([prompt]))[0][0, -1]
    assert cache.layers[0][0].dtype == torch.bfloat16
    torch.testing.assert_close(cached, whole, atol=0.05, rtol=0.05)


def test_a_cache_wants_causal_attention() -> None:
    model = Transformer(tiny_config(causal=False), VOCAB_SIZE).eval()
    with pytest.raises(ConfigError, match=r"model\.causal=False is not valid: expected true with a cache"):
        generate(model, tokens(3), 2, 0.0, 0, 16)


def test_routers_report_on_training_and_not_on_texts_that_are_written() -> None:
    model, text = make_model(ffn="moe"), tokens(8)[None]
    assert len(model(text)[1]) == model.config.num_layers
    cache = KVCache(model.config.num_layers, LENGTH)
    assert model(text, torch.arange(8)[None], cache)[1] == []
