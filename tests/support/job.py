"""The one tiny job with everything on that the callbacks' tests look at: tests/callbacks/conftest.py runs it."""

from pathlib import Path
from typing import NamedTuple

from tests.support.runs import Finished

STEPS, ACCUMULATE, BATCH_SIZE, SEQ_LEN = 5, 2, 4, 32


class Job(NamedTuple):
    """How it ended, and its folder."""

    finished: Finished
    folder: Path
