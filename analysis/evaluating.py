"""Looks into a model that trains: for a while it is as it is evaluated, and block by block as it is written."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Run a Transformer, within the context, in eval mode and without torch.compile.

    In eval mode no random numbers are drawn (the routers' jitter is off), so training stays the same; nothing inside of
    a compiled block can be watched, left out, or differentiated twice.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager") if model.config.compile else nullcontext():
            yield
    finally:
        model.train(was_training)
