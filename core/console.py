"""Keeps the console to what a person training a model wants to read."""

import logging
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_NOISE = (
    r".*does not have many workers.*",  # the reader is faster than worker processes are
    r".*Checkpoint directory .* exists and is not empty.*",  # a resumed run's own folder
    r".*You're resuming from a checkpoint that ended before the epoch ended.*",  # the stream has no epochs
    r".*The dirpath has changed from .*",  # a checkpoint that goes on in another folder
    r".*WeightAveraging callback with a model that overrides the configure_model.*",  # sharded ones are refused
    r".*treespec, LeafSpec.*",  # a deprecation inside Lightning
    r".*The `srun` command is available.*",
)


class _Printing(logging.Handler):
    """Prints what is logged, to wherever the standard output goes at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), flush=True)


def silence_noise() -> None:
    """Silence Lightning's hardware banner and the warnings that do not apply here; errors and the rest stay."""
    for package in ("lightning.pytorch", "lightning.fabric.utilities.distributed"):
        logging.getLogger(package).setLevel(logging.WARNING)
    profilers = logging.getLogger("lightning.pytorch.profilers")  # whose table is asked for
    profilers.setLevel(logging.INFO)
    profilers.handlers, profilers.propagate = [_Printing()], False  # once, whatever handlers there are above it
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)


@contextmanager
def quiet_writers() -> Iterator[None]:
    """Let TensorBoard's writing thread end without a traceback in the context: the next write raises the same error."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if type(arguments.thread).__name__ != "_AsyncWriterThread":
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def silent_if_it_fails() -> Iterator[None]:
    """Hold back what is written to the process' standard error in the context, and drop it at an error.

    For libraries that print why they fail, in several lines, beside what they raise, as those in Rust do. Those that
    write to the descriptor are meant, below Python.
    """
    with _ONE_AT_A_TIME, tempfile.TemporaryFile() as held:
        before = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(before, 2)
            raise
        else:
            os.dup2(before, 2)
            held.seek(0)
            while content := held.read(1 << 16):
                os.write(2, content)
        finally:
            os.close(before)


_ONE_AT_A_TIME = threading.RLock()
