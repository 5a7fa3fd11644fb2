"""The signals that ask a process to stop: SLURM and a terminal send them to its helpers too, which leave them to it."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from threading import Thread

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SENDER_KNOWN = hasattr(signal, "sigtimedwait")  # not on macOS, where helpers get the signals as before
SECONDS = 1.0  # between two looks whether the parent is there


@contextmanager
def held_back() -> Iterator[None]:
    """Hold STOPPING back from this thread, and for good from the processes it starts: these call `ignore_stop_signals`.

    Processes are born so, as a signal may come before their first line of Python.
    """
    if not SENDER_KNOWN:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals(*_: object) -> None:
    """End a process started under `held_back` upon its parent's own SIGTERM, or when the parent is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    if SENDER_KNOWN:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # a fork server's processes are not born so
    Thread(target=_obey, args=(parent, os.getppid()), daemon=True).start()


def _obey(parent: BaseProcess, born_to: int) -> None:
    """End upon a SIGTERM of the parent; `born_to` is its number, but in a fork server's process that server's."""
    # The parent may be gone by now; but seems alive as long as processes are that were forked after this one.
    while parent.is_alive() and os.getppid() == born_to:
        if not SENDER_KNOWN:
            time.sleep(SECONDS)
        elif (received := signal.sigtimedwait([signal.SIGTERM], SECONDS)) and received.si_pid == parent.pid:
            os._exit(0)  # torch's loader takes any other code for a process lost, even while it ends it
    os._exit(1)
