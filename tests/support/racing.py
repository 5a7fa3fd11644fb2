"""Processes that do the same at the same time."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.support.runs import ROOT

START = """
import sys
sys.path.insert(0, {root!r})
{imports}
print("ready", flush=True)
sys.stdin.readline()
{code}
"""


@contextmanager
def racing(cwd: Path, imports: str, code: str, *arguments: str) -> Iterator[list["subprocess.Popen[str]"]]:
    """One process for each argument; all begin with the code when the last one has done its imports."""
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": cwd}
    script = START.format(root=str(ROOT), imports=imports, code=code)
    with ExitStack() as stack:
        processes = [subprocess.Popen([sys.executable, "-c", script, argument], **pipes) for argument in arguments]
        for process in processes:
            stack.enter_context(process)
            stack.callback(process.kill)
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        yield processes
