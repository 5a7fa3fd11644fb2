"""Texts to prepare, and processes to wait for."""

import time
from collections.abc import Callable
from pathlib import Path

from tests.support.runs import TEXT

LINES = TEXT.decode().splitlines(keepends=True)


TEXTS = ["".join(LINES[start : start + 10]) for start in range(0, len(LINES), 10)]  # some 260 documents


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
