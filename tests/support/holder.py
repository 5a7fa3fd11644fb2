"""Another process that trains in a folder, as far as anybody can tell."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.runs import ROOT

HOLD = """
import os, sys
from pathlib import Path
from core.run_lock import held
with held(Path(sys.argv[1])):
    if os.fork() == 0:  # as data-loader processes are
        print("held", flush=True)
    os.read(0, 1)
"""


@contextmanager
def holder(run_dir: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the folder until it is killed, and has a child that outlives it."""
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir)], cwd=ROOT, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
