"""A model of this project as EleutherAI's lm-evaluation-harness sees one: batched, a context computed once."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from core.errors import ConfigError, UserError, require
from lightning_modules.generation import fed_width, feed, stream
from lightning_modules.layers.kv_cache import ROWS, KVCache
from lightning_modules.transformer import Transformer

Context = tuple[int, ...]
Group = tuple[Context, list[int]]
"""A context, and the numbers of the requests that continue it."""


AT_ONCE = 256
"""Tokens of a continuation whose logits exist at a time, a multiple of ROWS."""


USED = {
    "until",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
    "early_stopping",  # of beams: nothing to do here
    "use_cache",  # about speed: nothing to do here
}
"""What `generation_kwargs` of a task may ask for."""
NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "n": 1,
    "best_of": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "min_new_tokens": 0,
    "min_length": 0,
    "penalty_alpha": 0.0,
}
"""What it may say besides, as it changes nothing."""


LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def check_generation(options: object) -> None:
    """Refuse what a task's `generation_kwargs` ask for and the adapter does not do, or what cannot be.

    Raises:
        ConfigError: it names the option.
    """
    if not isinstance(options, Mapping):
        raise ConfigError("generation_kwargs", options, "options by name")
    for name, value in options.items():
        field = f"generation_kwargs.{name}"
        if name in NEUTRAL:
            neutral = NEUTRAL[name]
            require(value is None or value == neutral, field, value, f"{neutral}: the task asks for what is not there")
        elif name not in USED:
            require(value is None, field, value, f"a task that does without it; known are {', '.join(sorted(USED))}")
        elif value is not None and name in VALID:
            is_valid, valid = VALID[name]
            require(is_valid(value), field, value, valid)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _are_texts(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))


VALID: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda value: _is_number(value) and 0 <= value < math.inf, "a number >= 0"),
    "top_k": (lambda value: _is_count(value, 0), "an integer >= 0; 0: all tokens"),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "a number in (0, 1]"),
    **dict.fromkeys(LENGTHS, (lambda value: _is_count(value, 1), "an integer >= 1")),
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "until": (_are_texts, "a text or a list of texts, which end what is generated"),
}
"""What those of USED that matter may be, and the same in words."""


class Adapter(TemplateLM):
    """Answers the harness' three kinds of requests.

    Args:
        model: in eval mode.
        tokenizer: of its corpus; the token that ends a document stands before a text without a context.
        window: the most tokens that the model reads; of more, the last ones count.
        batch_size: sequences side by side.

    Raises:
        ConfigError: the model's attention is not causal: what it says of a token is no likelihood of it.
    """

    def __init__(self, model: Transformer, tokenizer: Any, window: int, batch_size: int) -> None:
        super().__init__()
        valid = "true: without causal attention a model sees the token whose likelihood is asked for"
        require(model.config.causal, "model.causal", model.config.causal, valid)
        self.model, self.texts, self.window, self.batch_size = model, tokenizer, window, batch_size
        self.num_computed = 0  # tokens that went through the model, copies included

    @property
    def eot_token_id(self) -> int:
        return self.texts.end_of_document

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.texts.encode(string.encode()).tolist()

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihoods of whole texts: each token counts once, in windows that follow each other."""
        pieces, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.window, context_len=1):
                pieces.append((("", ""), *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (loglikelihood, _) in zip(owners, self._loglikelihood_tokens(pieces), strict=True):
            totals[owner] += loglikelihood
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, whether it is the likeliest) of each continuation behind its context."""
        contexts: dict[Context, list[int]] = {}
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        fits = f"at least {longest}, the tokens of the longest continuation"
        require(longest <= self.window, "window", self.window, fits)
        for number, (_, context, continuation) in enumerate(requests):
            room = self.window + 1 - len(continuation)  # the last token is never read
            contexts.setdefault(tuple(context[-room:]), []).append(number)
        results = [(0.0, True)] * len(requests)
        progress = tqdm(total=len(requests), desc="log-likelihoods", disable=None)
        for batch in self._batches(contexts, {n: len(request[2]) for n, request in enumerate(requests)}):
            members = [number for _, numbers in batch for number in numbers]
            continuations = [requests[number][2] for number in members]
            for number, result in zip(members, self._score(batch, continuations), strict=True):
                results[number] = result
            progress.update(len(members))
        return results

    def _batches(self, contexts: dict[Context, list[int]], lengths: dict[int, int]) -> Iterator[list[Group]]:
        """Yield groups of at most batch_size requests, those of long contexts first; nothing that is empty."""
        batch: list[Group] = []
        for context, members in sorted(contexts.items(), key=lambda item: -len(item[0])):
            numbers = sorted((number for number in members if lengths[number]), key=lambda number: -lengths[number])
            for start in range(0, len(numbers), self.batch_size):
                group = numbers[start : start + self.batch_size]
                if sum(len(others) for _, others in batch) + len(group) > self.batch_size:
                    yield batch
                    batch = []
                batch.append((context, group))
        if batch:
            yield batch

    def _score(self, batch: list[Group], continuations: list[list[int]]) -> Iterator[tuple[float, bool]]:
        contexts = [list(context) for context, _ in batch]
        again = sum(len(context) * (len(numbers) - 1) for context, numbers in batch)
        if 4 * again <= sum(map(len, continuations)):
            repeated = [list(context) for context, numbers in batch for _ in numbers]
            yield from self._score_at_once(repeated, continuations)
            return
        owners = [row for row, (_, numbers) in enumerate(batch) for _ in numbers]
        starts = [len(contexts[row]) for row in owners]
        length = max(start + len(tokens) for start, tokens in zip(starts, continuations, strict=True))
        cache = KVCache(self.model.config.num_layers, length)
        rows = torch.tensor(owners, device=self.model.embedding.weight.device)
        first = self._feed(cache, contexts, [0] * len(contexts), ROWS)[rows, -1:]
        results = [_judged(row, tokens[:1]) for row, tokens in zip(first, continuations, strict=True)]
        cache, rest = cache.select(rows), [tokens[:-1] or tokens for tokens in continuations]
        for done in range(0, max(map(len, continuations)) - 1, AT_ONCE):
            # A shorter one gives its last token once more, where it was.
            places = [min(done, len(tokens) - 1) for tokens in rest]
            pieces = [tokens[place : place + AT_ONCE] for tokens, place in zip(rest, places, strict=True)]
            logits = self._feed(cache, pieces, [start + place for start, place in zip(starts, places, strict=True)])
            for number, (row, tokens) in enumerate(zip(logits, continuations, strict=True)):
                loglikelihood, likeliest = _judged(row, tokens[done + 1 : done + 1 + AT_ONCE])
                results[number] = results[number][0] + loglikelihood, results[number][1] and likeliest
        yield from results

    def _score_at_once(self, contexts: list[list[int]], continuations: list[list[int]]) -> Iterator[tuple[float, bool]]:
        """Score without a cache, which is of little use to contexts with one continuation each, or to short ones.

        Args:
            contexts: of each continuation its own, in full.
            continuations: at least one token each.
        """
        texts = [[*context, *tokens[:-1]] for context, tokens in zip(contexts, continuations, strict=True)]
        width = -(-max(map(len, texts)) // ROWS) * ROWS
        self.num_computed += len(texts) * width
        device = self.model.embedding.weight.device
        filled = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=device)
        states, _ = self.model.states(filled)
        scored = [
            (row, len(context) - 1 + place, token)
            for row, (context, tokens) in enumerate(zip(contexts, continuations, strict=True))
            for place, token in enumerate(tokens)
        ]
        logs, likeliest = [], []
        for start in range(0, len(scored), AT_ONCE):
            part = scored[start : start + AT_ONCE]
            rows, places, tokens = zip(*part, *part[-1:] * (-len(part) % ROWS), strict=True)
            logits = self.model.read_out(states[list(rows), list(places)].unsqueeze(0))[0]
            found = _log_likelihoods(logits, list(tokens))
            logs.append(found[0][: len(part)])
            likeliest.append(found[1][: len(part)])
        lengths = [len(tokens) for tokens in continuations]
        for values, hits in zip(torch.cat(logs).split(lengths), torch.cat(likeliest).split(lengths), strict=True):
            yield float(values.double().sum()), bool(hits.all())

    def _feed(
        self, cache: KVCache, pieces: list[list[int]], starts: list[int], logits_to_keep: int | None = None
    ) -> torch.Tensor:
        self.num_computed += len(pieces) * fed_width(pieces)
        return feed(self.model, cache, pieces, starts, logits_to_keep)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the contexts' continuations, up to the first of the strings that end them, or the document's end.

        Neither the batch size nor the other contexts of a batch change them: each has a seed of its own, its number.

        Raises:
            ConfigError: a task asks for a way of generating that there is not.
            UserError: the model diverged; its logits are not finite.
        """
        for request in requests:
            check_generation(request.args[1])
        results = [""] * len(requests)
        waiting: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            waiting.setdefault(repr(request.args[1]), []).append(number)
        for numbers in waiting.values():
            given = {name: value for name, value in requests[numbers[0]].args[1].items() if value is not None}
            options = normalize_gen_kwargs(given)
            prompts = {number: self._prompt(requests[number].args[0], options["max_gen_toks"]) for number in numbers}
            length = min(self.window, max(map(len, prompts.values())) + options["max_gen_toks"])
            numbers.sort(key=lambda number: -len(prompts[number]))
            for start in tqdm(range(0, len(numbers), self.batch_size), desc="texts", disable=None):
                batch = {number: prompts[number] for number in numbers[start : start + self.batch_size]}
                try:
                    texts = self._continue(batch, options, length)
                except ValueError as error:
                    raise UserError(f"no text: {error}") from error
                for number, text in zip(batch, texts, strict=True):
                    results[number] = text
        return results

    def _prompt(self, context: str, num_tokens: int) -> list[int]:
        """Return the last tokens of a context, with room in the window for so many more, or for half of it."""
        room = max(self.window - num_tokens, self.window // 2, 1)
        return (self.tok_encode(context) or [self.eot_token_id])[-room:]

    def _continue(self, prompts: dict[int, list[int]], options: Any, length: int) -> list[str]:
        most, until = options["max_gen_toks"], options["until"]
        temperature = options.get("temperature", 1.0 if options["do_sample"] else 0.0)
        top_p = options.get("top_p")
        shape: dict[str, Any] = {
            "top_k": options.get("top_k") or None,
            "top_p": 1.0 if top_p is None else top_p,
            "length": length,
        }
        new: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(len(prompts)))
        texts, seeds = list(prompts.values()), list(prompts)
        for tokens in stream(self.model, texts, most, temperature, seeds, self.window, **shape):
            for row in list(open_rows):
                new[row].append(tokens[row])
                ends = tokens[row] == self.eot_token_id
                if ends or any(stop and stop in self.texts.decode(new[row]) for stop in until):
                    open_rows.remove(row)
                    new[row] = new[row][:-1] if ends else new[row]
            if not open_rows:
                break
        return [postprocess_generated_text(self.texts.decode(row), until, None) for row in new]


def _judged(logits: torch.Tensor, tokens: list[int]) -> tuple[float, bool]:
    """Return the next tokens' log-likelihood by logits [as many or more, vocab_size], and if they are likeliest."""
    values, hits = _log_likelihoods(logits[: len(tokens)], tokens)
    return float(values.double().sum()), bool(hits.all())


def _log_likelihoods(logits: torch.Tensor, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's log-likelihood by its row of logits [tokens, vocab_size], and whether it is the likeliest."""
    logs, targets = logits.float().log_softmax(-1).cpu(), torch.tensor(tokens, dtype=torch.long)
    return logs.gather(-1, targets[:, None])[:, 0], logs.argmax(-1) == targets
