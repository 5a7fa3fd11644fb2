"""Sampling from a language model, with a cache of keys and values."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_modules.layers.kv_cache import ROWS, KVCache
from lightning_modules.transformer import Transformer


def feed(
    model: Transformer,
    cache: KVCache,
    pieces: Sequence[Sequence[int]],
    starts: Sequence[int],
    logits_to_keep: int | None = None,
) -> Tensor:
    """Return the logits of the next pieces of some sequences, which join the cache.

    Args:
        model: in eval mode.
        cache: of what comes before, one sequence for each piece.
        pieces: token ids, at least one each.
        starts: the position of each one's first token.
        logits_to_keep: of the last so many positions, a multiple of ROWS; None: of all. Those of a long prompt and a
            large vocabulary would take gigabytes.

    Returns:
        [batch, width or logits_to_keep, vocab_size]; shorter pieces end in copies of their last token's.
    """
    width = fed_width(pieces)
    places = [[min(place, len(piece) - 1) for place in range(width)] for piece in pieces]
    tokens = [[piece[place] for place in row] for piece, row in zip(pieces, places, strict=True)]
    positions = [[start + place for place in row] for start, row in zip(starts, places, strict=True)]
    device = model.embedding.weight.device
    sequences = torch.tensor(tokens, device=device), torch.tensor(positions, device=device)
    return model(*sequences, cache, logits_to_keep=logits_to_keep)[0]


def fed_width(pieces: Sequence[Sequence[int]]) -> int:
    """Return the positions of each of these pieces that `feed` has the model compute: in all, a multiple of ROWS."""
    width = max(map(len, pieces))
    return width if len(pieces) * width % ROWS == 0 else _rounded_up(width)


def _rounded_up(number: int) -> int:
    return -(-number // ROWS) * ROWS


def choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """Return the next token of each row.

    Args:
        logits: [batch, vocab_size].
        temperature: they are divided by it; 0 takes the likeliest token.
        top_k: only so many of the likeliest tokens are drawn from; None: all.
        top_p: of those, only the fewest likeliest ones whose probabilities reach this sum (nucleus, 1904.09751).
        generators: of each row's random numbers.

    Returns:
        Token ids [batch].

    Raises:
        ValueError: the logits are not finite, as after a run that diverged; there is nothing to draw from.
    """
    if not logits.isfinite().all():
        raise ValueError("the model's output is not finite")
    if temperature == 0:
        return logits.argmax(-1)
    # Below the largest, so that no temperature makes it infinite; what falls to minus infinity is never drawn.
    below = logits.double() - logits.double().amax(-1, keepdim=True)
    ordered, tokens = (below / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered, tokens = ordered[:, :top_k], tokens[:, :top_k]
    probabilities = ordered.softmax(-1)
    if top_p < 1:  # a GPU has no ordered sum for trainer.deterministic=true
        before = probabilities.cumsum(-1) - probabilities  # the sum of the likelier ones: 0 of the likeliest
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    drawn = [torch.multinomial(row, 1, generator=own) for row, own in zip(probabilities, generators, strict=True)]
    return tokens.gather(-1, torch.stack(drawn))[:, 0]


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    temperature: float,
    seeds: Sequence[int],
    window: int,
    top_k: int | None = None,
    top_p: float = 1.0,
    length: int | None = None,
) -> Iterator[list[int]]:
    """Continue prompts side by side, token by token.

    A prompt is read from its last `window` tokens on. A text that has filled the window begins anew with the last half
    of it. What becomes of a prompt does not depend on those beside it, given `length`.

    Args:
        model: left in the mode (train or eval) it came in.
        prompts: token ids, at least one each.
        num_tokens: how many to add.
        temperature, top_k, top_p: see choose.
        seeds: of each prompt's own generator; torch's global one is not touched.
        window: at most so many tokens are looked back at.
        length: of the cache, which decides about the logits' last bits; None: as short as these prompts allow.

    Yields:
        The next token of each.

    Raises:
        ValueError: see choose.
    """
    device = model.embedding.weight.device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    texts = [list(prompt[-window:]) for prompt in prompts]
    cache = KVCache(model.config.num_layers, _rounded_up(length or min(window, max(map(len, texts)) + num_tokens)))
    pieces, starts = texts, [0] * len(texts)
    was_training = model.training
    for _ in range(num_tokens):
        # For each token, as the caller may train in between; going through all modules takes a third of a small model's
        # step, so one that is in eval mode is left alone.
        if was_training:
            model.eval()
        try:
            with torch.inference_mode():
                logits = feed(model, cache, pieces, starts, ROWS)[:, -1].float()
                new = choose(logits, temperature, top_k, top_p, generators).tolist()
        finally:
            if was_training:
                model.train()
        yield new
        texts = [[*text, token] for text, token in zip(texts, new, strict=True)]
        pieces, starts = [[token] for token in new], [len(text) - 1 for text in texts]
        for row, text in enumerate(texts):
            if len(text) > window:  # written over from the cache's beginning; what is behind is masked
                texts[row] = pieces[row] = text[-max(1, window // 2) :]
                starts[row] = 0


def generate(model: Transformer, prompt: Tensor, num_tokens: int, temperature: float, seed: int, window: int) -> Tensor:
    """Return the token ids [seq] of a prompt with those that follow, [seq + num_tokens]; see stream."""
    new = [token for (token,) in stream(model, [prompt.tolist()], num_tokens, temperature, [seed], window)]
    return torch.cat((prompt, prompt.new_tensor(new)))
