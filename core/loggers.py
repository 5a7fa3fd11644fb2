"""Ends what a logger leaves open, and leaves out what says nothing."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def without_epoch(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of a step less `epoch`, which Lightning adds: the stream is a single one, number 0."""
    return {name: value for name, value in metrics.items() if name != "epoch"}


@contextmanager
def own_wandb_run() -> Iterator[None]:
    """End with the context the run at Weights & Biases that begins in it, as failed at an exception.

    Lightning leaves that to the end of the process. The next run of a sweep, in the same process, would be logged into
    the first one's. A run that somebody has begun before the context stays open.
    """
    before = _current()
    try:
        yield
    except BaseException:
        _end(before, exit_code=1)
        raise
    _end(before, exit_code=0)


def _current() -> object | None:
    return getattr(sys.modules.get("wandb"), "run", None)  # not imported here: it need not be installed


def _end(before: object | None, exit_code: int) -> None:
    if (run := _current()) is not None and run is not before:
        run.finish(exit_code=exit_code)  # type: ignore[attr-defined]
