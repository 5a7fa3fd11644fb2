"""Commands in processes of their own that take no seconds to start: forked from one that has imported everything.

Such a process has its own number, session, working folder, environment and output, as any other; what it lacks is a
Python that imports from the beginning. Tests of just that, and of what is set before torch is imported, start a real
one.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch

from tests.support.runs import ROOT, Finished

SECONDS = 250
PRELOADED = ["lightning", "tensorboard", "torch.utils.tensorboard", "s3fs", "core.build"]
PRELOADED += ["lightning_modules.language_module", "tests.support.killed", "tests.support.distributed_runs"]
PRELOADED += [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(ROOT.glob("callbacks/*/*.py"))]


def server() -> ForkServerContext:
    """The context whose processes come from the one that has imported everything; it starts with the first call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with contextlib.chdir(ROOT):  # where it looks for our modules; those it does not find it leaves out without a word
        forkserver.ensure_running()
    return context


def in_processes(function: Callable[..., None], arguments: tuple[Any, ...], number: int = 2) -> None:
    """Call `function(rank, *arguments)` in so many processes, as torch.multiprocessing.spawn does."""
    server()
    torch.multiprocessing.start_processes(function, arguments, number, start_method="forkserver")


class Started:
    """A command that runs.

    Attributes:
        process: its process.
        out, err: files, with what it has printed so far.
    """

    def __init__(self, cwd: Path, command: tuple[str, ...], environment: dict[str, str], folder: Path) -> None:
        self.out, self.err = folder / "out", folder / "err"
        self.out.touch()
        self.err.touch()
        arguments = (cwd, command, {**os.environ, "OMP_NUM_THREADS": "1", **environment}, self.out, self.err)
        self.process = server().Process(target=_work, args=arguments)
        self.process.start()

    def finish(self, seconds: float = SECONDS) -> Finished:
        """Wait for the end."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"it hangs: {self.err.read_text()}"
        return Finished(self.process.exitcode, self.out.read_text(), self.err.read_text())


@contextmanager
def started(cwd: Path, *command: str, **environment: str) -> Iterator[Started]:
    """`python COMMAND` in a session of its own, all of which is killed at the end.

    Args:
        cwd: its working folder.
        command: a script, `-m MODULE` or `-c CODE`, and arguments.
        environment: what it has beside this process' own.
    """
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:
        running = Started(cwd, command, environment, Path(folder))
        try:
            yield running
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.process.pid or 0, signal.SIGKILL)
            running.process.kill()  # where it has no session yet
            running.process.join()


def python(cwd: Path, *command: str, **environment: str) -> Finished:
    """`started`, to the end."""
    with started(cwd, *command, **environment) as running:
        return running.finish()


def _work(cwd: Path, command: tuple[str, ...], environment: dict[str, str], out: Path, err: Path) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    with open(1, "w", encoding="utf-8", closefd=False) as sys.stdout:
        try:
            _run(command)
        except SystemExit:
            raise
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            raise SystemExit(1) from None
        finally:  # as Python ends; multiprocessing leaves the functions out
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()


def _run(command: tuple[str, ...]) -> None:
    first, *rest = command
    if first == "-c":
        code, *rest = rest
        sys.argv, sys.path[0] = ["-c", *rest], ""
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        name, *rest = rest
        sys.argv, sys.path[0] = [name, *rest], ""
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *rest], str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")
