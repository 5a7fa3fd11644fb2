"""A model behind the harness' adapter, and requests to it."""

from types import SimpleNamespace
from typing import Any

from torch import nn

from datamodules.tokenizers import ByteTokenizer
from lightning_modules.transformer import Transformer
from tests.support.models import tiny_config
from tools.evaluation.adapter import Adapter

WINDOW = 40


PAIRS = [
    ("def f(x):", " return x"),
    ("def f(x):", "\n\treturn"),
    ("def f(x):", " "),
    ("", "import os"),
    ("", "x"),
    ("ends in a space ", "ß漢"),
    ("a context that is much longer than what the model can read at a time, ", "so its end counts"),
    ("short", "and a continuation that takes nearly all"),
]


TEXTS = ["", "x", "a text of one window", "a text over several windows, " * 4 + "and no whole number of them"]


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def make_adapter(batch_size: int = 3, **overrides: Any) -> Adapter:
    tokenizer = ByteTokenizer()
    model = Transformer(tiny_config(**overrides), tokenizer.vocab_size).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return Adapter(model, tokenizer, WINDOW, batch_size)
