"""Continue a text with a trained model, printing while it writes.

    python -m tools.generate RUN prompt="def "
    python -m tools.generate RUN prompt="def " num_tokens=500 temperature=1.2 top_k=50 top_p=0.9 seed=7
    python -m tools.generate RUN prompt="def " temperature=0                     always the likeliest token
    python -m tools.generate RUN                                                 a document from its beginning

Of a run on numbers (data=synthetic), the prompt is numbers too: prompt="3 1 4".

Ends where the model ends the document, or after `num_tokens`. Of a text longer than `window` the model sees the end
only. On a terminal control characters are shown as symbols and those that turn the direction of text as their escapes;
elsewhere all are written as they are.
"""

import itertools
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core import cli
from core.dataclass_cli import FIRST
from core.errors import UserError, require
from core.printable import printable

TURNING = [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]
"""Embeddings, overrides and isolates of Unicode: text behind one is shown in another order than it is written in."""


@dataclass(frozen=True)
class GenerateConfig:
    """Holds the fields that `python -m tools.generate` takes.

    Attributes:
        run: a run folder, such as runs/moe_spannorm/TIME.
        prompt: the text to continue; empty: the beginning of a document.
        num_tokens: write at most so many tokens.
        temperature: what the logits are divided by; 0: always the likeliest token.
        top_k: draw from so many of the likeliest tokens; null: from all.
        top_p: draw from the fewest likeliest tokens whose probabilities reach this sum.
        seed: the seed of the random numbers.
        window: the number of tokens that the model looks back at; null: as many as it was trained on.
        checkpoint: the one to take: last, best, or a path.
        allow: what the run's configuration names, and you vouch for: classes of yours, as my_file.Mine, and addresses.
    """

    run: Path = field(metadata=FIRST)
    prompt: str = ""
    num_tokens: int = 256
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    window: int | None = None
    checkpoint: str = "last"
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.num_tokens >= 1, "num_tokens", self.num_tokens, "an integer >= 1")
        require(0 <= self.temperature < math.inf, "temperature", self.temperature, "a number >= 0")
        for name in ("top_k", "window"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "an integer >= 1 or null")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        require(0 <= self.seed < 1 << 63, "seed", self.seed, "an integer in [0, 2**63)")


def continuation(run: Any, prompt: list[int], config: GenerateConfig, window: int) -> Iterator[int]:
    """Yield token ids, up to and without the one that ends the document."""
    from datamodules.tokenizers import NumberTokenizer
    from lightning_modules.generation import stream

    tokenizer = run.datamodule.tokenizer
    end = None if isinstance(tokenizer, NumberTokenizer) else tokenizer.end_of_document
    options = (config.num_tokens, config.temperature, [config.seed], window, config.top_k, config.top_p)
    for (token,) in stream(run.module.model, [prompt], *options):
        if token == end:
            return
        yield token


def as_text(prompt: list[int], tokens: Iterable[int], tokenizer: Any) -> Iterator[str]:
    """Yield the text of both, in pieces, each as soon as its characters are whole."""
    seen, shown = list(prompt), ""
    for token in itertools.chain([None], tokens):
        seen += [] if token is None else [token]
        text = tokenizer.decode(seen).rstrip("\N{REPLACEMENT CHARACTER}")
        yield text[len(shown) :]
        shown = max(shown, text, key=len)
    yield tokenizer.decode(seen)[len(shown) :]


def harmless(text: str) -> str:
    """Return the text with nothing that steers a terminal or turns the direction of text; tabs and line ends stay."""
    symbols = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
    escapes = {code: printable(chr(code)) for code in TURNING}
    return text.translate({**symbols, **escapes, 0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)})


@cli.tool
def main(config: GenerateConfig) -> None:
    from core.open_run import open_language_run
    from datamodules.tokenizers import tokens_of

    run = open_language_run(config.run, config.checkpoint, config.allow)
    tokenizer, window = run.datamodule.tokenizer, config.window or run.datamodule.seq_len
    prompt = tokens_of(config.prompt, tokenizer)
    if len(prompt) > window:
        print(f"The prompt has {len(prompt)} tokens; the model sees the last {window} of them.", file=sys.stderr)
    shown = harmless if sys.stdout.isatty() else str
    new = continuation(run, prompt or [tokenizer.end_of_document], config, window)
    try:
        for piece in as_text(prompt, new, tokenizer):
            print(shown(piece), end="", flush=True)
    except ValueError as error:
        raise UserError(f"no text: {error}") from error
    finally:
        print()


if __name__ == "__main__":
    cli.run(main)
