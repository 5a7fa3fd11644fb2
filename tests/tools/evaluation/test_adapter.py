"""The adapter's answers against a plain forward pass."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from core.errors import ConfigError, UserError
from lightning_modules.generation import feed
from tests.support.adapter import PAIRS, TEXTS, WINDOW, make_adapter, request
from tools.evaluation import adapter as adapter_module
from tools.evaluation.adapter import Adapter


def plain(adapter: Adapter, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One at a time, without a cache."""
    tokens = torch.tensor([[*context, *continuation][-WINDOW - 1 :]])
    with torch.no_grad():
        logs = adapter.model(tokens[:, :-1])[0][0].log_softmax(-1)[-len(continuation) :]
    targets = torch.tensor(continuation)
    return float(logs.gather(1, targets[:, None]).sum()), bool((logs.argmax(1) == targets).all())


@pytest.fixture(params=[4, 256])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The continuations' logits in pieces, and whole."""

    def checked(*arguments: Any) -> torch.Tensor:
        logits = feed(*arguments)
        assert logits.size(1) <= request.param
        return logits

    monkeypatch.setattr(adapter_module, "AT_ONCE", request.param)
    monkeypatch.setattr(adapter_module, "feed", checked)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("overrides", [{"placement": "siamesenorm"}, {"ffn": "moe"}], ids=["two streams", "moe"])
def test_log_likelihoods_are_those_of_a_plain_forward_pass(overrides: dict[str, Any], batch_size: int) -> None:
    adapter = make_adapter(batch_size, **overrides)
    likeliest = adapter.generate_until([request("def f(x):", {"max_gen_toks": 3})])[0]
    pairs = [*PAIRS, *([("def f(x):", likeliest)] if likeliest and likeliest.isascii() else [])]
    found = adapter.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (loglikelihood, greedy) in zip(pairs, found, strict=True):
        moved = context[len(context.rstrip()) :]  # the harness counts a space at the end to what follows
        before = list(context.rstrip().encode()) or [256]
        expected = plain(adapter, before, list((moved + continuation).encode()))
        assert loglikelihood == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1]


def test_a_context_is_computed_once() -> None:
    adapter = make_adapter(batch_size=64)
    choices = [request("a context of 24 letters.", end) for end in (" ends", " goes", " stop", " more")]
    adapter.loglikelihood(choices, disable_tqdm=True)
    assert adapter.num_computed == 24 + 4 * 4


@pytest.mark.usefixtures("at_once")
def test_whole_texts_are_read_in_windows() -> None:
    adapter = make_adapter()
    for text, found in zip(TEXTS, adapter.loglikelihood_rolling([request(text) for text in TEXTS]), strict=True):
        tokens, expected = list(text.encode()), 0.0
        for start in range(0, len(tokens), WINDOW):
            window = tokens[start : start + WINDOW]
            before = [256, *tokens][: start + 1][-(WINDOW + 1 - len(window)) :]  # the last window has more before it
            expected += plain(adapter, before, window)[0]
        assert found == pytest.approx(expected, abs=1e-3)


def test_logits_of_whole_texts_never_exist_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, sizes = make_adapter(batch_size=3), []
    read_out = adapter.model.read_out

    def counted(*arguments: Any) -> torch.Tensor:
        logits: torch.Tensor = read_out(*arguments)
        sizes.append(logits.shape[:2].numel())
        return logits

    monkeypatch.setattr(adapter_module, "AT_ONCE", 8)
    monkeypatch.setattr(adapter.model, "read_out", counted)
    adapter.loglikelihood_rolling([request(text) for text in TEXTS])
    assert set(sizes) <= {4, 8}
    assert len(sizes) > len(TEXTS)


def test_a_model_that_sees_what_comes_is_refused() -> None:
    with pytest.raises(ConfigError, match="causal=False is not valid"):
        make_adapter(causal=False)


def test_texts_go_on_to_what_ends_them() -> None:
    adapter = make_adapter(batch_size=2)
    contexts = ["def f(x):", "a", "", "a context that is much longer than what the model can read"]
    options = {"until": ["\n", "qq"], "max_gen_toks": 12, "do_sample": False}
    found = adapter.generate_until([request(context, options) for context in contexts])
    for context, text in zip(contexts, found, strict=True):
        tokens, new = (list(context.encode()) or [256])[-(WINDOW - 12) :], []
        for _ in range(12):
            with torch.no_grad():
                new.append(int(adapter.model(torch.tensor([tokens + new]))[0][0, -1].argmax()))
            if new[-1] == 256:
                break
        whole = adapter.texts.decode([token for token in new if token != 256])
        assert text == whole.split("\n")[0].split("qq")[0]
    number = max(range(len(found)), key=lambda n: len(found[n]))
    stop = found[number][-1]
    (shorter,) = adapter.generate_until([request(contexts[number], {**options, "until": [stop]})])
    assert shorter == found[number].split(stop)[0]
    assert len(shorter) < len(found[number])


@pytest.mark.parametrize("drawn", [{}, {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 0.95}])
def test_the_batch_size_does_not_change_a_text(drawn: dict[str, Any]) -> None:
    """Most of these overflow the window, each at a step of its own: no prompt may be longer than half of it."""
    long = "a context that is much longer than what the model can read"
    contexts = [long, "def f(x):", "", "a", "def f(x):", "medium one"]
    requests = [request(context, {"max_gen_toks": 60, **drawn}) for context in contexts]
    adapter = make_adapter()
    results = []
    for adapter.batch_size in (1, 4, 64):
        results.append(adapter.generate_until(requests))
    one, four, all_of_them = results
    assert one == four == all_of_them
    assert max(len(text.encode()) for text in one) > WINDOW, "it overflows"
    assert (one[1] == one[4]) is not bool(drawn), "of one context, each has its own"


def test_it_draws_as_a_task_says() -> None:
    adapter, options = make_adapter(), {"max_gen_toks": 20, "do_sample": True, "temperature": 1.0}
    likeliest, *drawn = (
        adapter.generate_until([request("def f(x):", {"max_gen_toks": 20, **more})])[0]
        for more in ({}, {**options, "top_k": 1}, {**options, "top_p": 1e-6}, {**options, "top_k": 0}, options)
    )
    assert drawn[0] == drawn[1] == likeliest
    assert drawn[2] == drawn[3] != likeliest


def test_sampling_without_a_temperature_is_at_one() -> None:
    """As transformers does it; the likeliest tokens would be another answer than the one that was asked for."""
    adapter, options = make_adapter(), {"max_gen_toks": 20, "do_sample": True}
    found = adapter.generate_until([request("def f(x):", {**options, **more}) for more in ({}, {"temperature": 1.0})])
    greedy = adapter.generate_until([request("def f(x):", {"max_gen_toks": 20})])
    again = adapter.generate_until([request("def f(x):", options)])
    assert found[0] == again[0] != greedy[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 10}, "generation_kwargs.num_beams=10 is not valid: expected 1: the task asks for what is not"),
        ({"repetition_penalty": 1.1}, "generation_kwargs.repetition_penalty=1.1 is not valid: expected 1.0"),
        ({"min_p": 0.1}, "generation_kwargs.min_p=0.1 is not valid: expected 0.0"),
        ({"think_end_token": "x"}, "generation_kwargs.think_end_token='x' is not valid: expected a task that does wi"),
        ({"temperature": -1.0}, "generation_kwargs.temperature=-1.0 is not valid: expected a number >= 0"),
        ({"top_p": 0.0}, r"generation_kwargs.top_p=0.0 is not valid: expected a number in \(0, 1\]"),
        ({"top_k": -1}, "generation_kwargs.top_k=-1 is not valid: expected an integer >= 0"),
        ({"temperature": "abc"}, "generation_kwargs.temperature='abc' is not valid: expected a number >= 0"),
        ({"temperature": math.nan}, "generation_kwargs.temperature=nan is not valid: expected a number >= 0"),
        ({"temperature": [1]}, r"generation_kwargs.temperature=\[1\] is not valid: expected a number >= 0"),
        ({"top_p": "most"}, "generation_kwargs.top_p='most' is not valid: expected a number"),
        ({"top_k": "few"}, "generation_kwargs.top_k='few' is not valid: expected an integer"),
        ({"top_k": 2.5}, "generation_kwargs.top_k=2.5 is not valid: expected an integer"),
        ({"max_gen_toks": "many"}, "generation_kwargs.max_gen_toks='many' is not valid: expected an integer >= 1"),
        ({"max_new_tokens": 0}, "generation_kwargs.max_new_tokens=0 is not valid: expected an integer >= 1"),
        ({"do_sample": "perhaps"}, "generation_kwargs.do_sample='perhaps' is not valid: expected true or false"),
        ({"until": 7}, "generation_kwargs.until=7 is not valid: expected a text or a list of texts"),
        ({"until": ["a", None]}, r"generation_kwargs.until=\['a', None\] is not valid: expected a text or a list"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_a_task_asks_for_in_vain_is_named(options: dict[str, Any], message: str) -> None:
    requests = [request("a", {"max_gen_toks": 2}), request("a", {"max_gen_toks": 2, **options})]
    with pytest.raises(ConfigError, match=message):
        make_adapter().generate_until(requests)


def test_what_changes_nothing_may_be_asked_for() -> None:
    neutral = {
        "num_beams": 1,
        "repetition_penalty": 1,
        "length_penalty": None,
        "use_cache": False,
        "num_return_sequences": 1,
        **dict.fromkeys(("temperature", "top_k", "top_p", "do_sample", "max_new_tokens", "until")),
    }
    adapter = make_adapter()
    plain, same = adapter.generate_until(
        [request("a", {"max_gen_toks": 4}), request("a", {"max_gen_toks": 4, **neutral})]
    )
    assert plain == same


def test_of_continuations_that_do_not_fit_the_longest_is_named() -> None:
    pairs = [request("", text) for text in ("x" * (WINDOW + 1), "y" * (WINDOW + 9), "z" * (WINDOW + 5))]
    message = f"window={WINDOW} is not valid: expected at least {WINDOW + 9}, the tokens of the longest continuation"
    with pytest.raises(ConfigError, match=message):
        make_adapter().loglikelihood(pairs, disable_tqdm=True)


def test_a_model_that_diverged_has_nothing_to_say() -> None:
    adapter = make_adapter()
    nn.init.constant_(adapter.model.head.weight, math.nan)
    with pytest.raises(UserError, match="no text: the model's output is not finite"):
        adapter.generate_until([request("a", {})])
