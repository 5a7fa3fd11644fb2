"""Trains in forks of a process that has torch and Lightning imported already, so that a run begins at once.

The process computes nothing itself: each run begins as it would in a process of its own, and has the same bits. Of the
project it imports nothing either, so that every run has the files as they are when it begins. A run outlives a study
that is killed, and holds the files that were passed to it open until it ends. CUDA does not survive a fork,
nor do the frameworks of macOS.

To the process goes a byte with the files, then a line with train.py's arguments as JSON; back comes a line with the
exit status, and only then may the next order come.
"""

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, NamedTuple

from setproctitle import setproctitle

ROOT = Path(__file__).resolve().parents[1]
TRAIN = str(ROOT / "train.py")
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that a launcher sends to all: they are the run's, which saves; what forks waits for that."""
IMPORTED = ("lightning", "torchmetrics", "tensorboard", "matplotlib.pyplot", "hydra", "pydantic")
"""What every run imports and takes long."""
START = "import runpy, sys; runpy.run_path(sys.argv[1])['main']()"
MAX_FILES = 8
GONE = b""
"""What is read where nobody writes any more."""


class Ended(NamedTuple):
    """Holds how a training process ended.

    Attributes:
        returncode: as subprocess has it: negative after a signal.
        stdout, stderr: what it printed.
    """

    returncode: int
    stdout: str
    stderr: str


class WarmProcess:
    """Trains one run after the other, each in a fork of one process, which is started when the first one is asked for.

    Args:
        threads: of each run.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._running: tuple[subprocess.Popen[bytes], socket.socket] | None = None

    def train(self, arguments: Sequence[str], held: Sequence[IO[str]] = ()) -> Ended:
        """Run train.py and return how it ended; as the process that forks, if that was killed.

        Args:
            arguments: of train.py, for a run of one process: what others print, or hold, is not waited for.
            held: files that the run is to hold open for as long as it lives, as locks.

        Raises:
            UserError: there is no process that could fork.
        """
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            _, ours = self._running = self._running or _start(self.threads)
            try:
                socket.send_fds(ours, [b"+"], [out.fileno(), err.fileno(), *(file.fileno() for file in held)])
                ours.sendall(json.dumps(list(arguments)).encode() + b"\n")
                answer = _line(ours)
            except ConnectionError:
                answer = GONE
            except BaseException:  # the answer may still come: nobody is to take it for that of the next run
                ours.close()
                self._running = None
                raise
            code = self.end() if answer == GONE else int(answer)
            if answer == GONE and code >= 0:
                from core.errors import UserError  # not above: the process that forks has nothing of the project

                raise UserError(
                    f"the process that starts the runs ended by itself, exit code {code}; why is said above"
                )
            out.seek(0)
            err.seek(0)
            said = (file.read().decode(errors="replace") for file in (out, err))
            return Ended(code, *said)

    def end(self) -> int:
        """End the process, and return how it ended; the next run would start another."""
        if self._running is None:
            return 0
        (process, ours), self._running = self._running, None
        ours.close()
        return process.wait()


def _start(threads: int) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, others = socket.socketpair()
    with others:
        process = subprocess.Popen(
            [sys.executable, "-c", START, __file__, str(others.fileno())],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            pass_fds=[others.fileno()],
        )
    return process, ours


def _line(of: socket.socket) -> bytes:
    with of.makefile("rb") as lines:
        return lines.readline()


@cache
def warm_process(threads: int) -> WarmProcess:
    """Return the one of this process, for runs of so many threads."""
    return WarmProcess(threads)


def serve(orders: socket.socket) -> list[str]:
    """Fork for each order, and answer with how the fork ended; end when nobody is left who could ask.

    Returns:
        In a fork: the arguments of train.py.
    """
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in STOPPING}
    while True:
        _, files, _, _ = socket.recv_fds(orders, 1, MAX_FILES)
        order = _line(orders)
        if not order.endswith(b"\n"):
            sys.exit()
        fork = os.fork()
        if fork == 0:
            orders.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.dup2(files[0], 1)
            os.dup2(files[1], 2)
            return [str(argument) for argument in json.loads(order)]
        for file in files:  # or it would hold the locks of runs that have ended
            os.close(file)
        _, status = os.waitpid(fork, 0)
        try:
            orders.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        except BrokenPipeError:
            sys.exit()


def main() -> None:
    """Take orders at the socket whose descriptor is the last argument, and in each fork run train.py."""
    sys.path[0] = str(ROOT)  # as train.py has it
    by_ctrl_c = signal.getsignal(signal.SIGINT)
    if by_ctrl_c == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # amid the imports it ends the process without a traceback
    for name in IMPORTED:
        import_module(name)
    signal.signal(signal.SIGINT, by_ctrl_c)
    gc.freeze()  # objects that no fork needs to look through
    sys.argv = [TRAIN, *serve(socket.socket(fileno=int(sys.argv[2])))]
    setproctitle(" ".join(("python", *sys.argv)))
    runpy.run_path(TRAIN, run_name="__main__")
